"""A persistent timing process: reads one JSON request per line, answers with one JSON line. Used for every side.

Run as `python _worker.py MODULE`; MODULE defines `case(name, **options) -> callable` whose call blocks until done.
Requests: {"open": id, "name": ..., "options": {...}} builds and warms a case; {"time": id, "repeat": n} times it;
{"give": id} asks for what it gives.
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
        request = json.loads(line)
        if "open" in request:
            began = time.perf_counter()
            cases[request["open"]] = case(request["name"], **request["options"])
            cases[request["open"]]()
            answer = {"first": time.perf_counter() - began}
            cases[request["open"]]()
        elif "give" in request:
            answer = {"given": cases[request["give"]]()}
        else:
            run, repeat = cases[request["time"]], request["repeat"]
            began = time.perf_counter()
            for _ in range(repeat):
                run()
            answer = {"seconds": (time.perf_counter() - began) / repeat}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
