"""Hostile programs, each in the form of a response."""

from __future__ import annotations

from typing import Any

# What each tries is reported by what `f` returns: beside it stands what a contained one returns.
# HOST, CWD (paths), PORT and HOST_PID are defined before it.
PROBES: dict[str, tuple[str, Any]] = {
    "fork": (
        r"""def f():
    import os
    try:
        os.fork()
    except OSError:
        return 'refused'
""",
        "refused",
    ),
    "subprocess": (
        r"""def f():
    import subprocess
    try:
        subprocess.run(['/bin/sh', '-c', 'true'])
    except OSError:
        return 'refused'
""",
        "refused",
    ),
    "threads": (
        r"""def f():
    import threading
    t = threading.Thread(target=int)
    t.start()
    t.join()
    return 1
""",
        1,
    ),
    "memory": (
        r"""def f():
    try:
        bytearray(1 << 30)
    except MemoryError:
        return 'refused'
""",
        "refused",
    ),
    "file": (
        r"""def f():
    try:
        open(HOST, 'w')
    except OSError:
        return 'refused'
""",
        "refused",
    ),
    "root": (
        r"""def f():
    try:
        open('/x', 'w')
    except OSError:
        return 'refused'
""",
        "refused",
    ),
    "library": (
        r"""def f():
    import os
    try:
        open(os.__file__, 'a')
    except OSError:
        return 'refused'
""",
        "refused",
    ),
    "full disk": (
        r"""def f():
    import os, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for i in range(9):
            open(f'/tmp/{i}', 'wb').write(bytes(8 << 20))
    except OSError:
        return 'refused'
""",
        "refused",
    ),
    "network": (
        r"""def f():
    import socket
    try:
        socket.create_connection(('127.0.0.1', PORT), 5)
    except OSError:
        return 'refused'
""",
        "refused",
    ),
    "environment": (
        r"""def f():
    import os
    seen = str(dict(os.environ))
    for pid in os.listdir('/proc'):
        if pid.isdigit():
            try:
                seen += open(f'/proc/{pid}/environ').read()
            except OSError:
                pass
    return 'HOST_SECRET' in seen
""",
        False,
    ),
    "host files": (
        r"""def f():
    import os
    paths = ['/etc/shadow', '/etc/passwd', '/home', '/root/.ssh', '/proc/1/root/etc/passwd', HOST, CWD]
    return [path for path in paths if os.path.exists(path)]
""",
        [],
    ),
    "signals": (
        r"""def f():
    import os, signal
    try:
        os.kill(HOST_PID, signal.SIGKILL)
    except OSError:
        return sorted(int(p) for p in os.listdir('/proc') if p.isdigit())[-1] < 10
""",
        True,
    ),
    "ctypes": (
        r"""def f():
    import ctypes
    c = ctypes.CDLL(None)
    argv = (ctypes.c_char_p * 2)(b'/bin/sh', None)
    tried = [c.execv(b'/bin/sh', argv), c.unshare(0x10000000), c.ptrace(16, 1, 0, 0), c.setns(0, 0), c.chroot(b'/tmp')]
    return [c.system(b'true') == 0, c.mount(b'a', b'/tmp', b'tmpfs', 0, None), *tried]
""",
        [False, -1, -1, -1, -1, -1, -1],
    ),
    "open files": (
        r"""def f():
    import os
    return len([i for i in range(4096) if os.path.exists(f'/proc/self/fd/{i}')])
""",
        5,
    ),
    "limits": (
        r"""def f():
    import resource as r
    try:
        r.setrlimit(r.RLIMIT_AS, (-1, -1))
    except (OSError, ValueError):
        return 'refused'
""",
        "refused",
    ),
}

# None of these sorts; each tries to be called right all the same, or to do harm, in another way.
ATTACKS = {
    "exits before the tests": r"""import sys
print('passes')
sys.exit(0)
""",
    "exits at once": r"""import os
os.write(1, b'[true, "passes"]')
os._exit(0)
""",
    "exits when asked": r"""def f(x):
    import os
    os._exit(0)
""",
    "raises SystemExit": r"""def f(x):
    raise SystemExit(0)
""",
    "raises AssertionError at once": r"""raise AssertionError
""",
    "writes the mark everywhere": r"""import os
for i in range(64):
    try:
        os.write(i, b'[true, \"passes\"]')
    except OSError:
        pass
def f(x):
    return x
""",
    "equals everything": r"""class A(list):
    def __eq__(s, o): return True
    __ne__ = lambda s, o: False
def f(x):
    return A()
""",
    "equals everything, unplain": r"""class A:
    def __eq__(s, o): return True
def f(x):
    return A()
""",
    "replaces json": r"""import json
json.dumps = lambda *a, **k: '[true, "passes"]'
def f(x):
    return x
""",
    "imports the harness again": r"""import sys, importlib
m = importlib.import_module('inside.cases')
m.Tests.end(m.Tests(0, 1, 2), True, 'passes')
""",
    "searches the heap": r"""import gc, sys
for o in gc.get_objects():
    if isinstance(o, dict) and 'verdict' in o:
        o['verdict'] = True
f = lambda x: x
""",
    "kills everybody": r"""import os, signal
os.kill(-1, signal.SIGKILL)
def f(x):
    return x
""",
    "kills its parent": r"""import os, signal
os.kill(os.getppid(), signal.SIGKILL)
def f(x):
    return x
""",
    "answers rubbish": r"""import os
for i in range(3, 64):
    try:
        os.write(i, b'\x08' + bytes(7) + b'\xff' * 64)
    except OSError:
        pass
f = lambda x: x
""",
    "answers deep rubbish": r"""import os
def f(x):
    b = b'[' * 1000000
    for i in range(3, 64):
        try:
            os.write(i, len(b).to_bytes(8, 'little') + b)
        except OSError:
            pass
    return x
""",
    "answers without end": r"""def f(x):
    return 'x' * (64 << 20)
""",
    "forks for ever": r"""import os
while True:
    try:
        os.fork()
    except OSError:
        break
def f(x):
    return x
""",
    "eats memory": r"""x = []
while True:
    x.append(bytearray(1 << 20))
""",
    "crashes": r"""import ctypes
ctypes.string_at(0)
""",
    "recurses": r"""import sys
sys.setrecursionlimit(10**5)
def g(): return g()
g()
""",
}
