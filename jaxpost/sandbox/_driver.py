"""The first lines that run inside a sandbox: the program, and word of how it ended.

Run as a script by a Python that can import nothing of ours, under the program's own
limits. Arguments: the program's file, and a mark; word goes to descriptor 3.
"""

import os
import sys
from types import TracebackType


def main() -> None:
    """Runs the program as `__main__` and tells that it begins, and how it ends."""
    path, mark = sys.argv[1:]
    sys.argv[:] = [path]
    os.set_inheritable(3, False)

    def tell(word: str) -> None:
        os.write(3, f"{mark} {word}\n".encode())

    def show(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        while trace and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # what is not the program's own
        sys.__excepthook__(kind, error.with_traceback(trace), trace)

    tell("start")
    sys.excepthook = show
    module = type(sys)("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    try:
        with open(path, encoding="utf-8") as file:
            code = compile(file.read(), path, "exec")
        exec(code, module.__dict__)
        sys.stdout.flush()
    except SystemExit:
        tell("left early")
        raise
    except MemoryError:
        tell("memory")
        raise
    except BaseException as error:
        tell(type(error).__name__)
        raise
    tell("end")


if __name__ == "__main__":
    main()
