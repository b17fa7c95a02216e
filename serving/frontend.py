"""One repair of TorchServe's frontend: it leaves forms to the worker, as it leaves JSON.

Its own decoder answers many a broken form with 500, and logs it with what was sent: any client can raise the alarm of
whoever is on call. Worse, it never gives back the memory of those: a hundred of 5 MB, and the server refuses all larger
bodies until it is started anew. So in a copy of the class that has the names of the media types, the two of forms are
what no header can hold; the body goes to the worker like any other, and handler/forms.py takes it apart.
"""

import logging
import os
import shlex
import struct
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from handler.options import FORM

log = logging.getLogger(__name__)
NAMES = "io/netty/handler/codec/http/HttpHeaderValues.class"
FORMS = (FORM, "application/x-www-form-urlencoded")
NEVER = "\v"  # Netty refuses a header with it
JAVA = """#!/bin/sh
# TorchServe has Java look for classes in the working folder first: in that of the repaired one instead.
for word do
    shift
    case $word in .:*) word={classes}${{word#.}} ;; esac
    set -- "$@" "$word"
done
exec {java} "$@"
"""


def repaired(java_home: Path, folder: Path) -> Path:
    """A JAVA_HOME, written in `folder`, for a TorchServe with the repair; the one given where that cannot be made."""
    code, java = _class(), folder / "bin" / "java"
    if all(code.count(_entry(form)) == 1 for form in FORMS):
        for form in FORMS:
            code = code.replace(_entry(form), _entry(NEVER))
        words = {"classes": folder / "classes", "java": java_home / "bin" / "java"}
        script = JAVA.format(**{name: shlex.quote(str(path)) for name, path in words.items()})
        for path, content in ((folder / "classes" / NAMES, code), (java, script.encode())):
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        java.chmod(0o755)
    if not os.access(java, os.X_OK):  # or the file system lets nothing be run
        log.warning("TorchServe will take forms apart itself, which docs/wire.md warns of: %s cannot be made", java)
        return java_home
    return folder


def _class() -> bytes:
    """The class as this TorchServe has it; empty where there is none: what is amiss then, its start will say."""
    try:
        with zipfile.ZipFile(str(distribution("torchserve").locate_file("ts/frontend/model-server.jar"))) as jar:
            return jar.read(NAMES)
    except (PackageNotFoundError, OSError, zipfile.BadZipFile, KeyError):
        return b""


def _entry(text: str) -> bytes:
    """An entry of a class's constant pool: tag, length, text (The Java Virtual Machine Specification, 4.4.7)."""
    return struct.pack(">BH", 1, len(text)) + text.encode()
