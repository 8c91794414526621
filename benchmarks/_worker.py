"""A persistent timing process: reads one JSON request per line, answers with one JSON line. Used for every side.

Run as `python _worker.py MODULE`; MODULE defines `case(name, **options) -> callable` whose call blocks until done.
Requests: {"open": id, "name": ..., "options": {...}} builds and warms a case; {"time": id, "repeat": n} times it;
{"call": name, "options": {...}} answers with what `case` gives. What fails is answered with {"error": ...}.
"""

import importlib
import json
import sys
import time


def main(module: str) -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not mix with the answers
    case = importlib.import_module(module).case
    cases = {}
    for line in sys.stdin:
        try:
            answer = answered(json.loads(line), case, cases)
        except Exception as error:  # the next request may succeed
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=replies, flush=True)


def answered(request: dict, case, cases: dict) -> dict:
    if "call" in request:
        return {"value": case(request["call"], **request["options"])}
    if "open" in request:
        began = time.perf_counter()
        run = case(request["name"], **request["options"])
        run()
        first = time.perf_counter() - began
        run()
        cases[request["open"]] = run
        return {"first": first}
    run, repeat = cases[request["time"]], request["repeat"]
    began = time.perf_counter()
    for _ in range(repeat):
        run()
    return {"seconds": (time.perf_counter() - began) / repeat}


if __name__ == "__main__":
    main(sys.argv[1])
