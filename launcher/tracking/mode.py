"""Where W&B keeps a run: online, offline or not at all. Never a prompt."""

from __future__ import annotations

import logging
import netrc
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

_log = logging.getLogger("scl.tracking")

# The public server's names, of old and as of wandb 0.31.
_PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")

Mode = Literal["online", "offline", "off"]
_WANDB_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}


def resolve_mode(wanted: Literal["auto", "online", "offline", "off"]) -> Mode:
    """The mode to start in. Online needs a key: without one, W&B would ask the terminal for it."""
    if wanted == "auto":
        from_environment = os.environ.get("WANDB_MODE", "")
        mode = _WANDB_MODES.get(from_environment)
        if from_environment and mode is None:
            _log.warning("WANDB_MODE=%s is not a mode; ignored", from_environment)
        if mode is None:
            return "online" if _has_credentials() else "offline"
    else:
        mode = wanted
    if mode == "online" and not _has_credentials():
        _log.warning(
            "W&B is to be online, but there is no API key in WANDB_API_KEY or netrc; going on "
            "offline"
        )
        return "offline"
    return mode


def _has_credentials() -> bool:
    """Whether W&B would find credentials by itself; the key itself is not kept anywhere."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(server).netloc,) if server else _PUBLIC_HOSTS
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.exists():
        return False
    try:
        known = netrc.netrc(path)
        return any(known.authenticators(host) for host in hosts)
    except (OSError, netrc.NetrcParseError) as error:
        _log.warning("cannot read %s: %s", path, error)
        return False
