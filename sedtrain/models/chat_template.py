"""Renders a chat template in a process of its own, with bounded memory and time: a stranger may have written it.

Jinja's sandbox keeps a template away from files and modules, but does not stop it from multiplying a text. The process runs
this file as a script, without the rest of the package.
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
"""Limits of a template: bytes of the process, CPU seconds (imports take one), characters of its text."""


def rendered(template: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Renders a template with JSON arguments. Returns the text and "", or "" and what is wrong with the template or Python."""
    given = json.dumps({"chat_template": template, **arguments})
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # its memory grows with the number of threads
    command = [sys.executable or "", "-P", __file__, str(SECONDS)]
    try:
        ended = subprocess.run(command, input=given, capture_output=True, text=True, env=environment)
    except OSError as error:
        return "", f"cannot be rendered: sys.executable={sys.executable!r} is no Python: {error.strerror}"
    if ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "", f"takes more than {SECONDS} s"
    if ended.returncode:
        return "", f"fails: {ended.stderr.strip()[-160:] or ended.returncode}"
    try:
        text, fault = json.loads(ended.stdout)
    except ValueError:
        return "", f"cannot be rendered: sys.executable={sys.executable!r} writes {ended.stdout[:80]!r}"
    return text, fault


def main() -> None:
    """Reads arguments from standard input and seconds from the command line; writes the text and the fault as JSON."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given, text, fault = json.load(sys.stdin), "", ""
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, int(sys.argv[1]))):
        allowed = resource.getrlimit(kind)[1]  # a process cannot raise its hard limit
        resource.setrlimit(kind, (most if allowed == resource.RLIM_INFINITY else min(most, allowed),) * 2)
    try:
        text = render_jinja_template(**given)[0][0]
    except MemoryError:
        fault = f"takes more than {MEMORY // 2**30} GiB of memory"
    except Exception as error:  # a template may raise anything
        fault = f"fails: {type(error).__name__} {' '.join(str(error).split())[:160]}"
    if len(text) > CHARACTERS:
        text, fault = "", f"writes {len(text)} characters"
    json.dump([text, fault], sys.stdout)


if __name__ == "__main__":
    main()
