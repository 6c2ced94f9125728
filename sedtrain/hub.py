"""The Hugging Face Hub, where it can be reached."""

import socket
import urllib.parse
import urllib.request

import datasets
import huggingface_hub


def go_offline_if_unreachable() -> None:
    """Where the Hub's address cannot be found, only its cache is asked: the client would retry for most of a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
