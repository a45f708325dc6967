"""The whole suite: every call is checked against its annotations; object storage that speaks S3."""

import itertools
import logging
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from jaxtyping import install_import_hook

# Not the commands: Typer hands them another class than the one that it has them ask for.
install_import_hook(
    ["ctfm.extract", "ctfm.heads", "ctfm.store"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server of this machine, with credentials for it in the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_REGION", "us-east-1")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def new_bucket(s3_endpoint: str) -> Callable[[], str]:
    """Makes an empty bucket; its URL."""
    numbers = itertools.count()

    def make() -> str:
        name = f"bucket-{next(numbers)}"
        request = urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT")
        with urllib.request.urlopen(request):
            return f"s3://{name}"

    return make


@pytest.fixture
def bucket(new_bucket: Callable[[], str]) -> str:
    """The URL of an empty bucket."""
    return new_bucket()
