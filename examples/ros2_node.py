"""A ROS 2 node: images in, /diagnostics and a JSON string out.

python ros2_node.py --ros-args -p model:=model.onnx -p topic:=/image

It was run against a recorded bag only (tests/test_examples.py feeds `Judge` from one), never on a live ROS 2 graph.
"""

import json
from typing import Any

from grood_edge.runtime import open_session
from grood_edge.runtime.bags import image_of
from grood_edge.runtime.decision import Observation, parse_decision


class Judge:
    """Everything that does not need ROS: an Image or CompressedImage message in, level, summary and fields out."""

    def __init__(self, model: str) -> None:
        self.session = open_session(model, color="rgb")
        self.decision = parse_decision("hysteresis", self.session.contract)
        self.memory: Any = None

    def judge(self, message: Any, seconds: float) -> tuple[int, str, dict[str, Any]]:
        """Return the diagnostic level (0 OK, 1 WARN, 2 ERROR), a sentence, and the fields of the JSON string."""
        if self.memory is None:
            self.memory = self.decision.start(seconds)
        verdict = self.session.predict(image_of(message))
        seen = Observation(
            seconds, "OK" if verdict.valid else "INVALID", verdict.class_id, verdict.class_name, verdict.p_value,
            verdict.is_ood,
        )  # fmt: skip
        self.memory = self.decision.step(self.memory, seen)
        state = self.memory.state
        fields = {"state": state.name, "since": state.since, "class": verdict.class_name, "p_value": verdict.p_value}
        level = {"KNOWN": 0, "UNSURE": 1, "UNKNOWN": 1, "NO-VIEW": 2}[state.name]
        return level, f"{state.name}: {state.reason}", fields


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
    judge = Judge(node.declare_parameter("model", "model.onnx").value)
    diagnostics = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
    states = node.create_publisher(String, "~/state", 10)

    def on_image(message: Any) -> None:
        stamp = message.header.stamp
        level, sentence, fields = judge.judge(message, stamp.sec + stamp.nanosec * 1e-9)
        status = DiagnosticStatus(level=bytes([level]), name="grood_edge", message=sentence)
        status.values = [KeyValue(key=key, value=str(value)) for key, value in fields.items()]
        array = DiagnosticArray(status=[status])
        array.header.stamp = stamp
        diagnostics.publish(array)
        states.publish(String(data=json.dumps(fields)))

    node.create_subscription(
        Image, node.declare_parameter("topic", "/image").value, on_image, qos_profile_sensor_data
    )  # keeps the newest frames, drops the rest
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        judge.session.close()
        node.destroy_node()


if __name__ == "__main__":
    main()
