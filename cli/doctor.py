"""`ctfm doctor`: what this machine can do, and which weights it has or can reach."""

from collections.abc import Iterator
from pathlib import Path

from ctfm.cli.console import out, print_table


def doctor() -> None:
    """Say what this machine can do: versions, device, memory, disk, hub cache, gated models."""
    import torch

    from ctfm.extract.backbones import list_backbones
    from ctfm.store.provenance import machine, versions

    print_table("versions", ["package", "version"], versions().items())
    print_table("\nmachine", ["what", "value"], [*machine().items(), *_device_lines()])
    rows = [
        [listed.entry.name, listed.weights, _hub_state(listed.entry.hub_id)]
        for listed in list_backbones()
        if listed.entry.hub_id is not None
    ]
    print_table("\nweights", ["model", "here", "hub"], rows)
    if not torch.cuda.is_available():
        out.print("\nno CUDA device: `intensity` runs well on a CPU, large backbones do not")


def _device_lines() -> Iterator[list[str]]:
    import shutil

    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    yield ["torch device", "cuda" if torch.cuda.is_available() else "cpu"]
    yield ["vector instructions", torch.backends.cpu.get_cpu_capability()]
    yield ["free disk here", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB"]
    yield ["models in the hub cache", str(len(list(Path(HF_HUB_CACHE).glob("models--*"))))]


def _hub_state(hub_id: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        HfApi().auth_check(hub_id)
    except GatedRepoError:
        return "gated: accept the licence on its page, then `hf auth login`"
    except HfHubHTTPError as error:
        return f"refused ({error.response.status_code})"
    except Exception:  # The hub's HTTP client has changed, and what it raises offline with it.
        return "not reachable"
    return "can be downloaded"
