"""Golden TensorBoard records: python tests/golden/make_train.py   (tensorboard 2.21.0, protobuf 7.36.2)"""
import io
import pathlib

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def framed(event):
    out = io.BytesIO()
    RecordWriter(out).write(event.SerializeToString())
    return out.getvalue().hex()


def scalar(step, value):
    return Event(wall_time=1.5, step=step, summary=Summary(value=[Summary.Value(tag="train/loss", simple_value=value)]))


image = Summary.Image(height=36, width=200, colorspace=3, encoded_image_string=b"not a real png")
records = {
    "version": Event(wall_time=1.5, file_version="brain.Event:2"),
    "start": Event(wall_time=1.5, step=101, session_log=SessionLog(status=SessionLog.START)),
    "scalar": scalar(300, 0.25),
    "scalar_step_0": scalar(0, -3.5),
    "image": Event(wall_time=1.5, step=7, summary=Summary(value=[Summary.Value(tag="samples", image=image)])),
}
target = pathlib.Path(__file__).parent / "train" / "events.txt"
target.write_text("".join(f"{name} {framed(event)}\n" for name, event in records.items()))
