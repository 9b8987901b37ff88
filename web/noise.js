// Python's noise: numpy's SeedSequence makes a seed of words and numbers (engine/rng.py), torch's Mersenne
// twister and Box-Muller make noise of the seed. The same seed gives the frames of `sample.py --seed`.

const uint32 = (x) => x >>> 0;

// numpy.random.SeedSequence(words).generate_state(2): numbers as BigInt or Number, words as strings
export function seedFor(...key) {
  const entropy = key.flatMap((part) => {
    let value = typeof part === "string" ? [...new TextEncoder().encode(part)].reduceRight((sum, byte) => sum * 256n + BigInt(byte), 0n) : BigInt(part);
    const parts = [Number(value & 0xffffffffn)];
    while ((value >>= 32n)) parts.push(Number(value & 0xffffffffn));
    return parts;
  });
  const pool = new Uint32Array(4);
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value = uint32(value ^ constant);
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return uint32(value ^ (value >>> 16));
  };
  const mix = (x, y) => {
    const value = uint32(Math.imul(x, 0xca01f9dd) - Math.imul(y, 0x4973f715));
    return uint32(value ^ (value >>> 16));
  };
  for (let i = 0; i < 4; i++) pool[i] = hash(entropy[i] ?? 0);
  for (let from = 0; from < 4; from++) for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  for (let i = 4; i < entropy.length; i++) for (let to = 0; to < 4; to++) pool[to] = mix(pool[to], hash(entropy[i]));
  constant = 0x8b51f9dd;
  return [0, 1].map((i) => {
    let value = uint32(pool[i] ^ constant);
    constant = Math.imul(constant, 0x58f38ded);
    value = Math.imul(value, constant);
    return uint32(value ^ (value >>> 16));
  });
}

// torch.Generator().manual_seed(...): the twister sees the lower half of the seed
export class Generator {
  constructor(...key) {
    const state = (this.state = new Uint32Array(624));
    state[0] = seedFor(...key)[1];
    for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    this.next = 624;
  }

  draw() {
    const { state } = this;
    if (this.next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.next = 0;
    }
    let y = state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return uint32(y ^ (y >>> 18));
  }

  // torch.randint(2**62, ())
  seed() {
    const high = BigInt(this.draw()), low = BigInt(this.draw());
    return ((high << 32n) | low) % (1n << 62n);
  }

  // torch.randn(size), for multiples of 16
  randn(size) {
    const x = Float32Array.from({ length: size }, () => (this.draw() & 0xffffff) / 0x1000000);
    for (let i = 0; i < size; i += 16) {
      for (let j = i; j < i + 8; j++) {
        const radius = Math.sqrt(-2 * Math.log(1 - x[j])), angle = 2 * Math.PI * x[j + 8];
        [x[j], x[j + 8]] = [radius * Math.cos(angle), radius * Math.sin(angle)];
      }
    }
    return x;
  }
}
