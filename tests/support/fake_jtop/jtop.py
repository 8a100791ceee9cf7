"""Stands in for jetson-stats' module `jtop`: the same names, shapes and units, on a machine without a board.

`FAKE_JTOP` says how it behaves: "works", "hangs", "refuses", "falls-silent", "prints" or "is-odd";
`FAKE_JTOP_PID` names a file for the process's id.
"""

import os
import time
from pathlib import Path

MANNER = os.environ.get("FAKE_JTOP", "works")


class JtopException(Exception):
    pass


class _NvpModel:
    def __repr__(self):
        return "25W"


class jtop:
    def __init__(self, interval=1.0):
        self._interval = interval
        self._samples = 0

    def __enter__(self):
        if "FAKE_JTOP_PID" in os.environ:
            Path(os.environ["FAKE_JTOP_PID"]).write_text(str(os.getpid()))
        if MANNER == "hangs":
            time.sleep(3600)
        if MANNER == "refuses":
            raise JtopException("The jtop.service is not active. Please run:\nsudo jtop --install-service")
        return self

    def __exit__(self, *_):
        pass

    def ok(self):
        self._samples += 1
        if self._samples > 1:
            time.sleep(3600 if MANNER == "falls-silent" else 0.02)
        if MANNER == "prints":
            print("[WARN] something that has no place on standard output")
        return True

    @property
    def temperature(self):
        sensors = {
            "cpu": {"temp": 48.5, "online": True},
            "cv0": {"temp": -256, "online": False},
            "tj": {"temp": 50.25, "online": True},
            "nvme Composite": {"temp": 41.85, "online": True, "max": 82.85, "crit": 84.85},
        }
        odd = {"gpu": None, "fan": {"temp": "warm"}, "broken": {"temp": -273.0}, "x" * 99: {"temp": 40.0}}
        return sensors | odd if MANNER == "is-odd" else sensors

    @property
    def power(self):
        # The rail of the module's input is taken out of the rails.
        rails = {"VDD_CPU_GPU_CV": rail(5040, 176, 887), "VDD_SOC": rail(5032, 304, 1529)}
        if MANNER == "is-odd":
            return {}
        return {"rail": rails, "tot": rail(5040, 984, 4959) | {"name": "VDD_IN"}}

    @property
    def gpu(self):
        status = {"railgate": False, "load": 37.5}
        freq = {"governor": "nvhost_podgov", "cur": 306000, "max": 1020000, "min": 306000, "GPC": [305937]}
        return {"gpu": {"type": "integrated", "status": status, "freq": freq}}

    @property
    def cpu(self):
        if MANNER == "is-odd":
            return {"total": {"idle": float("nan")}, "cpu": [{"online": False}]}
        cores = [{"online": True, "freq": {"cur": khz, "min": 115200, "max": 1728000}} for khz in (1e6, 2e6)]
        return {"total": {"user": 20.0, "nice": 0.0, "system": 5.0, "idle": 75.0}, "cpu": cores}

    @property
    def memory(self):
        return {
            "RAM": {"tot": 7802000, "used": 1, "free": 2, "buffers": 3, "cached": 4, "shared": 5, "lfb": 6}
        }

    @property
    def nvpmodel(self):
        return None if MANNER == "is-odd" else _NvpModel()


def rail(mv, ma, mw):
    return {"type": "INA3221", "online": True, "volt": mv, "curr": ma, "power": mw, "avg": mw, "warn": 32760}
