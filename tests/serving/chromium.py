"""Chromium without a window, driven by its own protocol over a pair of pipes."""

import fcntl
import json
import os
import shutil
import tempfile
from itertools import count

FOUND = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """One tab of a browser with a profile of its own, and a microphone that plays a WAV file. Use it as a context manager."""

    def __init__(self, microphone):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        into, self.commands = os.pipe()
        self.answers, out = os.pipe()
        flags = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "remote-debugging-pipe"]
        flags += [
            "use-fake-device-for-media-stream",
            "use-fake-ui-for-media-stream",
            f"user-data-dir={self.profile.name}",
        ]
        flags.append(f"use-file-for-fake-audio-capture={microphone}")
        silent = os.open(os.devnull, os.O_RDWR)
        fds = [silent, silent, silent, into, out]
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in fds]  # out of the way of 0 to 4
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(high)]
        self.pid = os.posix_spawn(FOUND, [FOUND, *(f"--{each}" for each in flags)], os.environ, file_actions=actions)
        for fd in [silent, into, out, *high]:
            os.close(fd)
        self.numbers, self.unread, self.session = count(1), b"", None

    def __enter__(self):
        tab = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        return self

    def __exit__(self, *_):
        self.session = None
        self.send("Browser.close")
        os.waitpid(self.pid, 0)
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()

    def send(self, method, **parameters):
        """The result of a command."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (message := self.received()).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    def received(self):
        while b"\0" not in self.unread:
            more = os.read(self.answers, 1 << 16)
            assert more, "the browser has ended"
            self.unread += more
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """The value of an expression of JavaScript, awaited where it is a promise."""
        found = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition):
        """Waits at most 60 s for an expression of JavaScript to be true."""
        promise = "new Promise((done, failed) => { const start = Date.now(); (function look() { %s ? done(true) :"
        promise += " Date.now() - start > 60000 ? failed('%s') : setTimeout(look, 20); })(); })"
        self.value(promise % (condition, "it did not come true"))

    def choose(self, selector, file):
        """Gives a file to an input of a page."""
        page = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=page, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(file)], nodeId=node)
