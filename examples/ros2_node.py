"""A ROS 2 node: images in, /diagnostics and a JSON string out.

python ros2_node.py --ros-args -p model:=model.onnx -p topic:=/image

It was run against a recorded bag only (tests/test_examples.py hands its messages to `Judge`), never on a live graph.
"""

import json
import time
from typing import Any

from grood_edge.errors import FrameError
from grood_edge.runtime import open_session
from grood_edge.runtime.capture.health import HealthMemory, HealthRules, check_frame, describe
from grood_edge.runtime.capture.ros_images import BadMessageError, read_picture
from grood_edge.runtime.capture.sources import CapturedFrame
from grood_edge.runtime.decision import Observation, State, parse_decision

IMAGE = "sensor_msgs/msg/Image"
PATIENCE = 0.5  # seconds without an image after which the camera stands still
LEVELS = {"KNOWN": 0, "UNSURE": 1, "UNKNOWN": 1, "NO-VIEW": 2}  # OK, WARN, ERROR
Report = tuple[int, str, dict[str, Any]]  # diagnostic level, a sentence, the fields of the JSON string


class Judge:
    """Everything that does not need ROS. `now`: seconds, by the clock of whoever receives the images."""

    def __init__(self, model: str, now: float) -> None:
        self.session = open_session(model, color="rgb")
        self.decision = parse_decision(f"hysteresis:k=3,n=4,no-view={PATIENCE}", self.session.contract)
        self.memory: Any = self.decision.start(now)
        self.newest = now
        camera = self.session.contract.preprocessing.camera
        shape = None if camera is None else (camera.height, camera.width)
        self.rules, self.health = HealthRules(max_age=None, shape=shape), HealthMemory()

    def image(self, message: bytes, now: float) -> Report:
        """Judge a serialised Image."""
        self.newest = now
        try:
            frame = CapturedFrame(read_picture(IMAGE, message).image, 0, now, None, "ros")
            self.health, status = check_frame(self.rules, self.health, frame, now)
            if status != "OK":  # black, saturated, frozen, or of another size than the camera's: never scored
                state, why = self._after(Observation(now, status)), describe(self.rules, frame, now, status)
                return 2, f"{state.name}: {status}, {why}", {"state": state.name, "since": state.since}
            verdict = self.session.predict(frame.image)
        except (BadMessageError, FrameError) as error:
            state = self._after(Observation(now, "INVALID"))
            return 2, f"{state.name}: an image that cannot be read: {error}", {"state": state.name}
        seen = Observation(now, "INVALID")
        if verdict.valid:
            seen = Observation(now, "OK", verdict.class_id, verdict.class_name, verdict.p_value, verdict.is_ood)
        state = self._after(seen)
        fields = {"state": state.name, "since": state.since, "class": verdict.class_name, "p_value": verdict.p_value}
        return LEVELS[state.name], f"{state.name}: {state.reason}", fields

    def silence(self, now: float) -> Report | None:
        """Say what holds while no image comes; None while that is not long enough to say anything."""
        if now - self.newest < PATIENCE:
            return None
        state = self._after(Observation(now, "STALE"))
        return LEVELS[state.name], f"{state.name}: {state.reason}", {"state": state.name, "since": state.since}

    def _after(self, seen: Observation) -> State:
        self.memory = self.decision.step(self.memory, seen)
        state: State = self.memory.state
        return state


def main() -> None:
    """Spin the node."""
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
    from rclpy.node import Node
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image
    from std_msgs.msg import String

    rclpy.init()
    node = Node("grood_edge")
    judge = Judge(node.declare_parameter("model", "model.onnx").value, time.monotonic())
    diagnostics = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
    states = node.create_publisher(String, "~/state", 10)

    def publish(report: Report | None) -> None:
        if report is None:
            return
        level, sentence, fields = report
        values = [KeyValue(key=key, value=str(value)) for key, value in fields.items()]
        array = DiagnosticArray(
            status=[DiagnosticStatus(level=bytes([level]), name="grood_edge", message=sentence, values=values)]
        )
        array.header.stamp = node.get_clock().now().to_msg()
        diagnostics.publish(array)
        states.publish(String(data=json.dumps(fields)))

    topic = node.declare_parameter("topic", "/image").value
    node.create_subscription(
        Image, topic, lambda message: publish(judge.image(message, time.monotonic())), qos_profile_sensor_data, raw=True
    )  # the newest frames only
    node.create_timer(PATIENCE / 2, lambda: publish(judge.silence(time.monotonic())))  # tells of a camera that stops
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        judge.session.close()
        node.destroy_node()


if __name__ == "__main__":
    main()
