"""What goes wrong between this machine and a hub, in sentences that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from huggingface_hub import constants, errors

if TYPE_CHECKING:
    from fluxjax.hub import Name


def is_offline(error: BaseException) -> bool:
    """Could the hub not be asked (switched off, no network, or it is out of order)?"""
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error) >= 500
    kinds = (errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    # The HTTP library is huggingface_hub's own choice, and has changed.
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, kinds) or bool(names & {"TransportError", "RequestError"})


@contextmanager
def explained(name: Name) -> Iterator[None]:
    """Raises what huggingface_hub raises as FileNotFoundError, PermissionError or OSError."""
    where = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(_gated(name, where)) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no file or folder {name.repo} here, and {where} has no such model, or it is "
            "private: then log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{name.repo} has no revision {name.revision}") from None
    except errors.HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise PermissionError(_gated(name, where)) from None
        raise OSError(f"{where} answered about {name.repo}: {_first_line(error)}") from None
    except (TypeError, LookupError, AssertionError, json.JSONDecodeError) as error:
        raise OSError(
            f"{where} does not answer about {name.repo} as a hub does ({_first_line(error)})"
        ) from None
    except Exception as error:
        if str(error).startswith("Consistency check failed"):
            reason = f"{where} sent another size than it had said: try again"
            raise OSError(f"{name.repo}: {reason} ({_first_line(error)})") from None
        if not (is_offline(error) or isinstance(error, errors.LocalEntryNotFoundError)):
            raise
        off = isinstance(error, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if off else f"{where} cannot be reached"
        raise FileNotFoundError(
            f"there is no file or folder {name.repo} here, not all of the model {name.repo} is in "
            f"the cache {constants.HF_HUB_CACHE}, and {reason}"
        ) from None


def _gated(name: Name, where: str) -> str:
    return (
        f"{name.repo} is gated: accept its terms at {where}/{name.repo}, then log in with "
        "`hf auth login` or set HF_TOKEN"
    )


def _status(error: errors.HfHubHTTPError) -> int:
    return getattr(error.response, "status_code", 0)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
