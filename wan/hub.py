"""What is not here: packages of the extra `wan`, and names on huggingface.co in the place of files."""

import importlib
import re
from pathlib import Path

from config import BadInput

WAN = ("transformer/*", "vae/*", "text_encoder/*", "tokenizer/*")  # of Wan2.1 in diffusers' format


def extra(module: str):
    """An installed module. Raises BadInput."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"{module.partition('.')[0]} is needed: pip install 'stream-r1[wan]'") from error


def local(name: str, files: tuple[str, ...] = WAN) -> str:
    """What is here stays as it is. "owner/repository" → the folder of its snapshot, of which only `files`
    are fetched; "owner/repository:path" → that file. What is in the cache is not fetched again, and a
    download that was cut off goes on. HF_HOME, HF_HUB_OFFLINE and HF_TOKEN count as they do elsewhere.
    Raises BadInput."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?", name)
    if not found or Path(name).exists():
        return name
    try:
        from huggingface_hub import hf_hub_download, snapshot_download

        if found[2]:
            return hf_hub_download(found[1], found[2])
        return snapshot_download(found[1], allow_patterns=list(files))
    except ImportError as error:
        raise BadInput(f"{name} is not here; to fetch it: pip install 'stream-r1[wan]'") from error
    except Exception as error:  # no network, no such name, no access, a full disk: a dozen kinds
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise BadInput(f"{name} is not here, and could not be fetched from huggingface.co: {why}") from error
