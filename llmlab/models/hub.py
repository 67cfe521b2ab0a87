"""Models of the Hugging Face hub, fetched into its cache. Only a hub id that the user named gets here."""

from __future__ import annotations

from pathlib import Path

from llmlab.types import ModelError

# What loading needs: no pickled weights, no second copy of the weights in another format.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """The directory of a hub model in the local cache, downloaded if it is not there.

    Raises ModelError where the hub cannot be reached and the cache has nothing, or the id is wrong or
    closed to this user. Obeys HF_HUB_OFFLINE, HF_HOME and HF_TOKEN as huggingface_hub does.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(PATTERNS)))
    except GatedRepoError as error:
        problem = "the hub gives this model only to users who accepted its licence"
        raise _error(hub_id, problem, "Accept it on the model's page, then `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        problem = "the hub has no such model, or it is private"
        raise _error(hub_id, problem, "Check the spelling; `hf auth login` for a private one.") from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        HfHubHTTPError,
    ) as error:  # no network, offline mode, disk full
        problem = (
            f"no such directory, not in the hub cache, and the hub cannot be asked ({_first_line(error)})"
        )
        way_out = (
            f"With a network: `hf download {hub_id} --local-dir DIR` on any machine, copy DIR here and give "
            "its path as the model. Without: use a shipped model (`llmlab models`)."
        )
        raise _error(hub_id, problem, way_out) from error


def _error(hub_id: str, problem: str, way_out: str) -> ModelError:
    return ModelError("model", hub_id, problem, way_out)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160].rstrip(".")
