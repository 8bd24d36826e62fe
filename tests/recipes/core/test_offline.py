"""A run without a network says at once what it wanted from it."""

import os
import subprocess
import sys

import pytest

FETCH = """
import socket, urllib.request
from bigbatch.recipes.core.offline import forbid_network
forbid_network()
listener = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listener.getsockname()).close()
import huggingface_hub.constants as hub
print(hub.HF_HUB_OFFLINE)
try:
    WANTED
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "wanted",
    [
        'urllib.request.urlopen("http://example.org/")',
        'socket.create_connection(("192.0.2.1", 80), timeout=1)',
        'socket.socket(socket.AF_INET6).connect(("2001:db8::1", 443, 0, 0))',
    ],
)
def test_a_connection_to_another_host_is_refused_and_one_to_this_host_is_not(wanted):
    code = FETCH.replace("WANTED", wanted)
    environment = {**os.environ, "BIGBATCH_OFFLINE": "1"}
    answer = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    offline, refused = answer.stdout.splitlines()
    assert offline == "True"
    assert refused.startswith("UserError BIGBATCH_OFFLINE: is 1, and something asked for ")
    assert refused.endswith("`bigbatch bundle` gathers what a run needs")
