"""A page that streams while you type: the video, its prompt, how it keeps time, and a look inside.

    python demo.py                       # http://127.0.0.1:8000
    python demo.py --deadline=16 --adapt # twice as fast; too slow a machine takes fewer steps
    python demo.py small --student=out/train/student.safetensors --port=8001
    python demo.py wan-1.3b --wan=Wan2.1-T2V-1.3B-Diffusers --student=student.safetensors

Enter changes the prompt without a cut; a webcam or a clip can be made over. It needs the extra "demo".
Nothing but this machine can reach the page unless --host says otherwise; there is no password.
"""

from engine import openmp  # isort: skip  (before torch loads)

from dataclasses import dataclass

from config import BadInput, cli, read_cli
from sample import open_networks


@dataclass(frozen=True)
class Flags:
    host: str = "127.0.0.1"  # where to listen; 0.0.0.0: everybody on the network may watch
    port: int = 8000  # 0: any that is free
    streams: int = 2  # viewers at a time; more wait in line
    deadline: int = 0  # frames a second that are played, evenly; 0: as many as the preset has
    adapt: bool = False  # fewer denoising steps while the machine is too slow for that
    steps: int = 0  # denoising steps per chunk; 0: as trained
    student: str = ""  # default assets/<preset>/stream_r1.safetensors
    codec: str = ""  # default: beside the student
    wan: str = ""  # Wan2.1 in diffusers' format: codec and text


def main() -> None:
    preset, typed, flags = read_cli(None, Flags, __doc__)
    try:
        from live.server import application, listen, serve
        from live.show import studio_of
    except ModuleNotFoundError as error:
        raise BadInput(f"demo.py needs {error.name}: pip install -e '.[demo]'") from error
    if not (1 <= flags.streams <= 64 and 0 <= flags.deadline <= 60):
        given = f"streams={flags.streams} deadline={flags.deadline}"
        raise BadInput(f"{given} is not possible; allowed: 1 to 64 streams, 0 to 60 frames a second")
    taken = listen(flags.host, flags.port)
    cfg, student, codec, read = open_networks(preset, typed, flags)
    openmp.use_threads(cfg.threads or int(cfg.preset == "tiny"))  # of every stream
    serve(application(studio_of(cfg, student, codec, read, flags), flags.streams, flags.host), taken)


if __name__ == "__main__":
    cli(main)
