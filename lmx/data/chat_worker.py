"""A process that renders chat templates, one JSON line in, one out. chat_template.py starts it and reads its answers.

    {"source": "{{ messages[0].content }}", "names": {...}, "most": 100, "seconds": 5, "conversations":
     [{"messages": [...], "renders": [[1, true], [2, false]], "marks": ["", ""]}]}
    [[{"text": "..."}, {"kind": "syntax", "line": 1, "message": "..."}]]

Each render is of the first so many messages, with or without the beginning of a reply; the marks are written around
what the template puts between {% generation %} and {% endgeneration %}.

A template comes with a model from anywhere, and Jinja's sandbox bounds neither time nor memory; this process has
bounds on both, holds nothing worth reading, and ends when its standard input does.
Source: transformers, utils/chat_template_utils.py, for the environment that templates are written for.
"""

import functools
import importlib
import json
import signal
import sys
import traceback
from datetime import datetime

MEMORY = 1 << 30
"""Bytes of address space, where the system has such a limit."""
TOLD = 400
"""Characters of an error that are passed on."""


MARKS = ["", ""]
"""Of the conversation that is rendered."""


@functools.cache
def environment():
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks a reply for training."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_held"), [], [], body).set_lineno(line)

        def _held(self, caller):
            before, after = MARKS
            return f"{before}{caller()}{after}"

    class PlainNamespace(Namespace):
        """Without names that Python itself looks up."""

        def __init__(*args, **names):
            PlainNamespace.check(dict(*args[1:], **names))
            Namespace.__init__(*args, **names)

        def __setitem__(self, name, value):
            PlainNamespace.check((name,))
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(names):
            if hidden := [name for name in names if str(name).startswith("_")]:
                raise SecurityError(f"a namespace takes no name like {hidden[0]!r}")

    class Refused(TemplateError):
        """What the template itself raises."""

    def raise_exception(message):
        raise Refused(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "namespace": PlainNamespace}
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


@functools.lru_cache(maxsize=8)
def compiled(source):
    return environment().from_string(source)


def answer(source, names, most):
    """{"text"}, or {"kind", "line", "message"} of what went wrong."""
    try:
        text, length = [], 0
        for piece in compiled(source).generate(names):
            length += len(piece)
            if length > most:
                return {"kind": "long"}
            text.append(piece)
        return {"text": "".join(text)}
    except MemoryError:
        return {"kind": "memory"}
    except RecursionError:
        return {"kind": "deep"}
    except Exception as error:  # a template can raise anything, and what asked for it is told
        kinds = {"TemplateSyntaxError": "syntax", "TemplateAssertionError": "syntax", "Refused": "refused"}
        kind = kinds.get(type(error).__name__, "other")
        at = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == "<template>"
        ]
        message = str(error)[:TOLD] or type(error).__name__
        if not type(error).__module__.startswith("jinja2") and kind == "other":
            message = f"{type(error).__name__}: {message}"
        return {
            "kind": kind,
            "line": getattr(error, "lineno", None) or (at or [None])[-1],
            "message": message,
        }


def answers(source, names, most, conversations):
    """For each conversation the answers to its renders."""
    found = []
    for one in conversations:
        MARKS[:] = one["marks"]
        messages = one["messages"]
        of = [names | {"messages": messages[:n], "add_generation_prompt": add} for n, add in one["renders"]]
        found.append([answer(source, each, most) for each in of])
    return found


def confine():
    """Sets the limits that the system has. Ctrl-C is for the process that asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import resource
    except ImportError:  # no such limits on Windows: what asked still ends this process in time
        return
    for name, most in (("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except (OSError, ValueError):  # macOS has RLIMIT_AS by name only
            continue


def main():
    sys.path += sys.argv[1:]
    importlib.import_module("jinja2.sandbox")
    confine()
    alarm = getattr(signal, "setitimer", None)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if alarm:  # the system ends a process that its parent, killed meanwhile, can no longer end
            alarm(signal.ITIMER_REAL, asked["seconds"])
        found = answers(*(asked[name] for name in ("source", "names", "most", "conversations")))
        if alarm:
            alarm(signal.ITIMER_REAL, 0)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
