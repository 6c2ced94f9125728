"""The Hugging Face Hub, on machines without network."""

import socket
import sys
import urllib.parse
import urllib.request

import huggingface_hub


def go_offline_if_unreachable() -> None:
    """Uses only the Hub's local cache if its host name does not resolve; the client would retry for most of a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        if datasets := sys.modules.get("datasets"):  # datasets copied the value on import
            datasets.config.HF_HUB_OFFLINE = True
