"""The Hugging Face Hub, where it can be reached."""

import socket
import sys
import urllib.parse
import urllib.request

import huggingface_hub


def go_offline_if_unreachable() -> None:
    """Asks only the Hub's cache from now on where its address cannot be found: the client would retry for most of a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        if datasets := sys.modules.get("datasets"):  # it copies the value when it is imported
            datasets.config.HF_HUB_OFFLINE = True
