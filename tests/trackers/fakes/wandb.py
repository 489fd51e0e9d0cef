"""As much of wandb's client as is used, with its signatures; every call is written to $FAKE_CALLS."""

import json
import os
import time


def _told(call, /, **values):
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(json.dumps({"call": call, **values}) + "\n")
    how, _, where = os.environ.get("FAKE_FAULT", "").partition(" in ")
    if where == call and how == "hang":
        time.sleep(3600)
    if where == call:
        raise RuntimeError(f"401 for key {os.environ['WANDB_API_KEY']}")


class Run:
    def log(self, data, step=None, commit=None, sync=None):
        _told("log", data=data, step=step)

    def finish(self, exit_code=None, quiet=None):
        _told("finish", exit_code=exit_code)


def init(entity=None, project=None, dir=None, id=None, name=None, config=None, resume=None):
    _told("init", project=project, dir=dir, id=id, name=name, config=config, resume=resume)
    return Run()
