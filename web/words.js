// world/words.py's grammar: a prompt in any order → (colour shape motion speed) per object, and the background.

export function meaning(prompt, { words, vocabulary, objects }) {
  const said = prompt.normalize("NFKC").toLowerCase().match(/[\p{L}\p{M}\p{N}\p{So}]+/gu) ?? [];
  if (!said.length) throw new Error("the prompt is empty; try 'a red circle moving left slowly on a black background'");
  for (const word of said) {
    if (word in vocabulary) continue;
    const near = nearest(word, Object.keys(vocabulary));
    throw new Error(`unknown word '${word.slice(0, 40)}'; ${near ? `did you mean '${near}'? ` : ""}known words: ${Object.keys(vocabulary).join(" ")}`);
  }
  const kinds = Object.keys(words).filter((kind) => kind !== "background"), things = [{}];
  let background = "";
  const once = (old, word) => {
    if (old && old !== word) throw new Error(`'${old}' and '${word}' contradict each other; 'and' joins two objects`);
    return word;
  };
  for (const word of said) {
    const kind = kinds.find((each) => words[each].includes(word));
    if (word === "and") things.push({});
    else if (words.background.includes(word)) background = once(background, word);
    else if (kind) things.at(-1)[kind] = once(things.at(-1)[kind], word);
  }
  if (!background && !things.some((thing) => Object.keys(thing).length)) throw new Error("the prompt says nothing that is known");
  if (things.length > objects) throw new Error(`the prompt names ${things.length} objects; this model knows at most ${objects}`);
  while (things.length < objects) things.push({});
  return [...things.flatMap((thing) => kinds.map((kind) => thing[kind] ?? "")), background];
}

// the word that shares most letters in order, if that is most of both
function nearest(word, known) {
  const share = (a, b) => {
    const row = new Array(b.length + 1).fill(0);
    for (const x of a) for (let j = 1, before = 0; j <= b.length; j++) {
      const old = row[j];
      row[j] = x === b[j - 1] ? before + 1 : Math.max(old, row[j - 1]);
      before = old;
    }
    return (2 * row[b.length]) / (a.length + b.length);
  };
  const best = known.reduce((a, b) => (share(word, b) > share(word, a) ? b : a));
  return share(word, best) >= 0.6 ? best : "";
}
