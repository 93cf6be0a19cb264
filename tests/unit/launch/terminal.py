"""A command whose input is a real terminal."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

from remote_cli import environment_of


class Terminal:
    """A command whose input is a terminal; its two outputs are read as they come."""

    def __init__(self, *arguments, platform):
        keyboard, stdin = pty.openpty()
        self._keyboard = os.fdopen(keyboard, "wb", buffering=0)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "composer_replication", *arguments],
            env=environment_of(platform),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.close(stdin)
        self.said = ""
        streams = (self._process.stdout, self._process.stderr)
        self._readers = [threading.Thread(target=self._read, args=(each,)) for each in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, stream):
        with stream:
            while text := os.read(stream.fileno(), 4096):
                self.said += text.decode()

    def wait_for(self, text):
        self.wait_until(lambda: text in self.said)

    def wait_until(self, claim):
        end = time.monotonic() + 120
        while not claim():
            assert time.monotonic() < end, self.said
            assert self._process.poll() is None, self.said
            time.sleep(0.02)

    def answer(self, text):
        self._keyboard.write(text)

    def interrupt(self):
        self._process.send_signal(signal.SIGINT)

    def end(self):
        """The exit code."""
        code = self._process.wait(120)
        for reader in self._readers:
            reader.join()
        self._keyboard.close()
        return code
