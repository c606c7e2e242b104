"""`regard push`: a checkpoint onto the Hugging Face Hub. Its arguments stand in `regard_cli`."""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from regard.cli import complain, quiet_transformers
from regard.export import ExportError, export_checkpoint
from regard.hub import CheckpointError
from regard_cli import EXIT_FAILED, EXIT_OK


class PushError(ValueError):
    """A checkpoint that could not be put on the Hub. The message names the repository, the reason and the mend."""


def run(options: argparse.Namespace) -> int:
    """Run `regard push` and return its exit code."""
    quiet_transformers()
    disable_progress_bars()
    try:
        commit = push_checkpoint(
            options.model,
            options.repository,
            private=options.private,
            with_code=options.with_code,
            revision=options.revision,
            message=options.message,
        )
    except (CheckpointError, ExportError, PushError) as error:
        complain(error)
        return EXIT_FAILED
    print(commit.commit_url)
    return EXIT_OK


def push_checkpoint(
    model: str | Path,
    repository: str,
    *,
    private: bool = False,
    with_code: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> CommitInfo:
    """Put what `export_checkpoint` writes into a repository of the Hub, ONNX graphs too, as one commit.

    The repository and the branch are made if they are not there. What breaks off leaves them without the commit.

    Args:
        model: see `regard.hub.resolve`.
        repository: OWNER/NAME.
        private: make the repository private. One that is there and public is refused.
        with_code: add the code that loads the model without regard.
        revision: a branch; None is main.
        message: of the commit.

    Raises:
        CheckpointError, ExportError: as `export_checkpoint` has them.
        PushError: there is no token or no network, or the Hub refuses.
    """
    if get_token() is None:
        raise PushError(f"{repository}: no token to write with; run `hf auth login`, or set HF_TOKEN")
    if repository.count("/") != 1:
        raise PushError(f"{repository}: not of the form OWNER/NAME")
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="regard-push-") as folder:
        export_checkpoint(model, folder, with_code)
        try:
            api.create_repo(repository, private=private or None, exist_ok=True)
            if private and not api.model_info(repository).private:
                raise PushError(f"{repository}: is public; make it private in its settings, or leave out --private")
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"Upload {Path(model).name} with regard",
            )
        except HFValidationError as error:
            raise PushError(f"{repository}: {error}") from error
        except HfHubHTTPError as error:
            reason = error.server_message or str(error).strip().splitlines()[0]
            mend = "check the Hub's answer"
            if error.response.status_code in (401, 403):
                mend = "use a token of its owner's that may write (`hf auth login`, or HF_TOKEN)"
            raise PushError(f"{repository}: refused ({reason}); {mend}") from error
        except OfflineModeIsEnabled as error:
            raise PushError(f"{repository}: HF_HUB_OFFLINE is set; unset it to push") from error
        except (HTTPError, OSError, RuntimeError) as error:  # the last wraps what breaks a large file's upload off
            cause = error.__cause__ or error
            reason = str(cause) or type(cause).__name__
            raise PushError(f"{repository}: not pushed ({reason}); check the network and repeat the command") from error
