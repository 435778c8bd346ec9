"""Models by their hub id, through huggingface_hub: its cache, its offline variables, its tokens."""

import re
from pathlib import Path

from latentdiff.checkpoints.files import CheckpointError

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA = re.compile(
    r"([\w-]+/)?(model_index|config|[\w-]+_config|special_tokens_map|vocab|tokenizer|added_tokens)\.json|[\w-]+/merges\.txt"
)
WEIGHTS = re.compile(
    r"([\w-]+/)?(diffusion_pytorch_model|model|pytorch_model)(?P<variant>\.[\w-]+?)?(-\d+-of-\d+)?"
    r"\.(?P<kind>safetensors|bin)(\.index(\.\w+)?\.json)?"
)
FOLDERS = ("", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "clip")


def is_id(text: str) -> bool:
    return bool(ID.fullmatch(text)) and not text.endswith((".safetensors", ".ckpt", ".pt", ".bin"))


def fetch(
    repo: str, *, variant: str | None = None, revision: str | None = None, allow_pickle: bool = False, vae: bool | None = None
) -> Path:
    """The folder of a hub id in huggingface_hub's cache; only the files that are needed are downloaded.

    With HF_HUB_OFFLINE, or where the hub cannot be reached or refuses, what the cache holds is used.
    Errors: FileNotFoundError, or CheckpointError with what the hub says, where that is nothing; CheckpointError for an unknown
    revision, and for a part that is there as a pickle alone, unless `allow_pickle`.
    vae: True where only its autoencoder is needed, False where all but that.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    try:
        try:
            # Asks once; `list_repo_files` would go on asking for 23 s where there is no network.
            info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except RevisionNotFoundError:
            raise
        except Exception as error:  # offline, out of reach, down, refused: the errors are those of whichever HTTP library it uses
            try:
                return Path(snapshot_download(repo, revision=revision, local_files_only=True))
            except LocalEntryNotFoundError as nothing:
                refused = isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500
                if refused and not getattr(nothing, "snapshot_path", None):
                    raise error from None
                raise
        files = needed(repo, [file.rfilename for file in info.siblings or []], variant, allow_pickle=allow_pickle, vae=vae)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except LocalEntryNotFoundError as error:
        if part := getattr(error, "snapshot_path", None):  # "incomplete": the files that we never fetch are not there
            return Path(part)
        raise FileNotFoundError(
            f"{repo}: not in the cache of huggingface_hub, and the hub is off or out of reach (HF_HUB_OFFLINE?); "
            "a model on this machine is named by its path"
        ) from None
    except HfHubHTTPError as error:
        said = [line for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{repo}: the hub says: {' '.join(said[:2])}") from None


def needed(repo: str, files: list[str], variant: str | None, *, allow_pickle: bool = False, vae: bool | None = None) -> list[str]:
    """Of a repository's files those that a load reads: configurations, and one precision of each part's weights.

    vae: True for those of its autoencoder alone, False for all without its weights. A pickle is taken where a part has nothing
    else. Errors: CheckpointError for one without `allow_pickle`.
    """
    own = "" if "config.json" in files else "vae"  # where `io.load_vae` looks
    files = [f for f in files if f.rpartition("/")[0] in ((own,) if vae else FOLDERS)]
    chosen = [f for f in files if DATA.fullmatch(f)]
    weights: dict[str, dict[str, dict[str, list[str]]]] = {}
    for file in files:
        if match := WEIGHTS.fullmatch(file):
            index_variant = re.search(r"\.index\.(\w+)\.json$", file)
            name = match["variant"] or (f".{index_variant[1]}" if index_variant else "")
            kinds = weights.setdefault(file.rpartition("/")[0], {})
            kinds.setdefault(match["kind"], {}).setdefault(name, []).append(file)
    for part, kinds in weights.items():
        if not part and "model_index.json" in files:
            continue  # a model's weights lie in the folders of its parts
        if vae is False and part == "vae":
            continue
        if "safetensors" not in kinds and not allow_pickle:
            raise CheckpointError(
                f"{repo}: of {part or 'the weights'} there is only a pickle (.bin), which can run code when read; if you trust it, "
                "allow_pickle=True (--allow-pickle), which still reads nothing but tensors"
            )
        variants = kinds.get("safetensors") or kinds["bin"]
        chosen += variants.get(f".{variant}") or variants.get("") or variants[min(variants)]
    return chosen
