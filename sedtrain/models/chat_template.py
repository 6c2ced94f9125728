"""Renders a chat template, a program that a stranger may have written, in a process of its own with bounded memory and time.

Jinja's sandbox keeps a template from files and modules, but not from multiplying a text. The process runs this file alone
and imports nothing of the package.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

MEMORY, SECONDS, CHARACTERS = 2**31, 20, 100_000
"""Limits of a template: bytes of the process, seconds of the CPU (a second goes to imports), characters of its text."""


def rendered(template: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """The text that a template makes of values of JSON, and ""; or "" and what is wrong with the template, or with Python."""
    given = json.dumps({"chat_template": template, **arguments})
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # whose memory grows with the cores
    command = [sys.executable or "", "-P", __file__, str(SECONDS)]
    try:
        answer = subprocess.run(command, input=given, capture_output=True, text=True, env=environment)
    except OSError as error:
        return "", f"cannot be rendered: sys.executable={sys.executable!r} is no Python: {error.strerror}"
    if answer.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "", f"takes more than {SECONDS} s"
    if answer.returncode:
        return "", f"fails: {answer.stderr.strip()[-160:] or answer.returncode}"
    try:
        text, fault = json.loads(answer.stdout)
    except ValueError:
        return "", f"cannot be rendered: sys.executable={sys.executable!r} writes {answer.stdout[:80]!r}"
    return text, fault


def main() -> None:
    """Reads the arguments from standard input, the seconds from the command line, and writes the text and the fault."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given, text, fault = json.load(sys.stdin), "", ""
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, int(sys.argv[1]))):
        allowed = resource.getrlimit(kind)[1]  # nobody may raise it
        resource.setrlimit(kind, (most if allowed == resource.RLIM_INFINITY else min(most, allowed),) * 2)
    try:
        text = render_jinja_template(**given)[0][0]
    except MemoryError:
        fault = f"takes more than {MEMORY // 2**30} GiB of memory"
    except Exception as error:  # of whatever kind
        fault = f"fails: {type(error).__name__} {' '.join(str(error).split())[:160]}"
    if len(text) > CHARACTERS:
        text, fault = "", f"writes {len(text)} characters"
    json.dump([text, fault], sys.stdout)


if __name__ == "__main__":
    main()
