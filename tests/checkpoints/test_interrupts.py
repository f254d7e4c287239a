import os
import signal
import subprocess
import sys
import threading

import pytest

from sb3_mbpo.checkpoints.interrupts import Interrupted, Interrupts


def test_the_first_one_is_noted():
    before = signal.getsignal(signal.SIGUSR1)
    interrupts = Interrupts(["SIGUSR1", "SIGTERM"])
    interrupts.listen()
    try:
        interrupts.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupts.received is signal.SIGUSR1
        with pytest.raises(Interrupted, match="SIGUSR1"):
            interrupts.check()
    finally:
        interrupts.close()
    assert signal.getsignal(signal.SIGUSR1) is before and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_second_one_does_what_it_always_did():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("mine"))
    interrupts = Interrupts(["SIGUSR1"])
    try:
        interrupts.listen()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == ["mine"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_twice():
    # A shell that starts the tests in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts = Interrupts(["SIGINT"])
    interrupts.listen()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_second_sigterm_ends_the_process():
    code = "import os, signal; from sb3_mbpo.checkpoints.interrupts import Interrupts\n"
    code += "i = Interrupts(['SIGTERM']); i.listen()\n"
    code += "os.kill(os.getpid(), signal.SIGTERM); print(i.received.name, flush=True); os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "import time; time.sleep(60)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert result.stdout == "SIGTERM\n" and result.returncode == -signal.SIGTERM


def test_off_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGUSR1)
    interrupts, seen = Interrupts(["SIGUSR1"]), []
    thread = threading.Thread(target=lambda: (interrupts.listen(), seen.append(signal.getsignal(signal.SIGUSR1))))
    thread.start(), thread.join()
    assert seen == [before]
    interrupts.close()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_the_system_does_not_have():
    assert Interrupts(["SIGNOTHING"]).signals == []


def test_names_only():
    with pytest.raises(ValueError, match=r"signals=.*'SIGTERM'"):
        Interrupts([15])
