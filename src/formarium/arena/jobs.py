"""The runs of a study: one, and several side by side in processes of one thread each."""

import contextlib
import errno
import json
import math
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from ..core.errors import FormariumError
from ..core.registry import systems
from .study import Cell, Seed, Study, find_study

FREE = 1 << 20  # bytes; less is a full disk
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
Job = dict[str, Any]
Record = dict[str, Any]

def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _loaded(path: str) -> Study:
    return find_study(path)[0]


def run_job(job: Job) -> Record:
    """Does one job in its folder and gives its record; a finished one is read. What a user can mend raises."""
    import numpy as np
    import torch

    from .config import read_json, write_json
    from .train import Diverged

    folder = Path(job["folder"])
    file = folder / "cell.json"
    about = {"arm": job["arm"], "lr": job["lr"], "seed": job["seed"]}
    if file.exists():
        return read_json(file)
    study = _loaded(job["study"])
    torch.manual_seed(job["seed"])
    np.random.seed(job["seed"])
    random.seed(job["seed"])
    begun, worked, values, reason, status = time.perf_counter(), time.process_time(), {}, "", "done"
    with full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if job["kind"] == "prepare":
                assert study.prepare is not None
                study.prepare(Seed(study, job["seed"], folder, job["quick"]))
            else:
                prepared = Path(job["prepared"]) if job["prepared"] else None
                arm = job["arm"]
                cell = Cell(study, job["seed"], folder, job["quick"], arm, study.arms[arm], job["lr"], prepared)
                values, status, reason = _numbers(study, study.measure(cell))
        except Diverged as error:
            status, reason = "diverged", str(error)
        except Exception as error:
            if _is_full(error, folder):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            if not isinstance(error, RuntimeError | ArithmeticError | MemoryError):
                raise  # a mistake in the study, or one that a user can mend
            status, reason = "failed", (str(error).splitlines() or [type(error).__name__])[0]
        if status != "done" and job["kind"] == "prepare":
            raise FormariumError(f"the study {study.name} cannot be prepared for seed {job['seed']}: {reason}")
        found = about | {"status": status, "reason": reason, "values": values,
                         "seconds": round(time.perf_counter() - begun, 3),
                         "cpu_seconds": round(time.process_time() - worked, 3)}
        write_json(file, found)
    return found


def _numbers(study: Study, found: Mapping[str, float]) -> tuple[dict[str, float], str, str]:
    """What was measured, checked: the deciding number is there, and so is "val" where it chooses; all that is finite."""
    needed = [study.decides.number, *["val"] * (len(study.lrs) > 1)]
    for name in needed:
        if name not in found:
            raise FormariumError(f"the study {study.name} measures {', '.join(found)}, but no {name!r}, which "
                                 f"{'chooses the rate' if name == 'val' else 'decides'}")
    values = {k: float(v) for k, v in found.items()}
    lost = [k for k in needed if not math.isfinite(values[k])]
    kept = {k: v for k, v in values.items() if math.isfinite(v)}
    return (kept, "diverged", f"{lost[0]} is {values[lost[0]]}") if lost else (kept, "done", "")


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Within, a file that cannot be written is an error that a user can mend, since what is finished stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise FormariumError(f"{folder} cannot be written ({error.strerror or error}). Finished runs are kept"
                             f"{'; make room on the disk' if full else ''}, and the same command goes on") from error


def _is_full(error: BaseException, folder: Path) -> bool:
    return "No space left" in str(error) or shutil.disk_usage(folder).free < FREE


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """Processes with one thread each that do jobs, which come and go as lines of JSON. They end when their input does."""

    def __init__(self, count: int) -> None:
        self.count, self.idle = count, queue.SimpleQueue[subprocess.Popen[str]]()

    def __enter__(self) -> "Workers":
        alone = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.all: list[subprocess.Popen[str]] = []
        modules = json.dumps([str(e.path) for e in systems().values() if e.module_name.startswith("formarium_user.")])
        for _ in range(self.count):
            self.all.append(subprocess.Popen([sys.executable, "-m", __name__, modules], stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, text=True, env=os.environ | alone))
            self.idle.put(self.all[-1])
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is KeyboardInterrupt:  # they have heard it too and save their states
            deadline = time.monotonic() + 10
            while any(w.poll() is None for w in self.all) and time.monotonic() < deadline:
                time.sleep(0.05)
        for worker in self.all:
            assert worker.stdin is not None
            with contextlib.suppress(OSError):
                worker.stdin.close()
        for worker in self.all:
            worker.wait()
            assert worker.stdout is not None
            worker.stdout.close()

    def do(self, jobs: Sequence[Job], told: Callable[[Job, Record], Record]) -> list[Record]:
        lock, stop = threading.Lock(), threading.Event()

        def one(job: Job) -> Record | None:
            if stop.is_set():
                return None
            worker = self.idle.get()
            try:
                found = self._ask(worker, job)
            except BaseException:
                stop.set()  # what is not begun stays undone
                raise
            finally:
                self.idle.put(worker)
            with lock:
                return told(job, found)

        pool = ThreadPoolExecutor(self.count)
        try:
            waiting = [pool.submit(one, job) for job in jobs]
            return [r for r in (f.result() for f in waiting) if r is not None]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _ask(worker: "subprocess.Popen[str]", job: Job) -> Record:
        assert worker.stdin is not None
        assert worker.stdout is not None
        where = f"study {job['name']}, arm {job['arm']!r}, seed {job['seed']}"
        try:
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise FormariumError(f"{where}: the process that ran it ended (status {worker.poll()}), perhaps for want of "
                                 "memory. Finished runs are kept; try again with --jobs 1")
        answer = json.loads(line)
        if "error" in answer:
            raise FormariumError(answer["error"]) if answer["mendable"] else RuntimeError(f"{where}\n{answer['error']}")
        return answer["found"]


def _work() -> None:
    """The life of a worker: jobs come on the standard input, answers leave on the standard output."""
    from ..core.registry import add_module

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a study prints must not stand among the answers
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(1)  # who asked is gone

    threading.Thread(target=listen, daemon=True).start()
    for path in json.loads(sys.argv[1]):
        add_module(path)
    with one_thread():
        while True:
            try:
                answer: dict[str, Any] = {"found": run_job(json.loads(jobs.get()))}
            except FormariumError as error:
                answer = {"error": str(error), "mendable": True}
            except KeyboardInterrupt:
                os._exit(130)  # the listener waits for input, and a usual end would wait for it
            except Exception:
                answer = {"error": traceback.format_exc(), "mendable": False}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    _work()
