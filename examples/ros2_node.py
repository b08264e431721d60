"""A ROS 2 node: images in, /diagnostics and a JSON string out.

python ros2_node.py --ros-args -p model:=model.onnx -p topic:=/image

It was run against a recorded bag only (tests/test_examples.py hands its messages to `Judge`), never on a live graph.
"""

import json
from typing import Any

from grood_edge.runtime import open_session
from grood_edge.runtime.decision import Observation, parse_decision
from grood_edge.runtime.ros_images import BadMessageError, read_picture

IMAGE = "sensor_msgs/msg/Image"


class Judge:
    """Everything that does not need ROS: a serialised Image in; level, sentence and fields out."""

    def __init__(self, model: str) -> None:
        self.session = open_session(model, color="rgb")
        self.decision = parse_decision("hysteresis:k=3,n=4", self.session.contract)
        self.memory: Any = None

    def judge(self, message: bytes) -> tuple[int, str, dict[str, Any]]:
        """Return the diagnostic level (0 OK, 1 WARN, 2 ERROR), a sentence, and the fields of the JSON string."""
        try:
            picture = read_picture(IMAGE, message)
        except BadMessageError as error:
            return 2, f"an image that cannot be read: {error}", {"state": "INVALID"}
        seconds = picture.stamp or 0.0
        self.memory = self.memory or self.decision.start(seconds)
        verdict = self.session.predict(picture.image)
        seen = Observation(seconds, "INVALID")
        if verdict.valid:
            seen = Observation(seconds, "OK", verdict.class_id, verdict.class_name, verdict.p_value, verdict.is_ood)
        self.memory = self.decision.step(self.memory, seen)
        state = self.memory.state
        fields = {"state": state.name, "since": state.since, "class": verdict.class_name, "p_value": verdict.p_value}
        return (
            {"KNOWN": 0, "UNSURE": 1, "UNKNOWN": 1, "NO-VIEW": 2}[state.name],
            f"{state.name}: {state.reason}",
            fields,
        )


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

    def on_image(message: bytes) -> None:
        level, sentence, fields = judge.judge(message)
        values = [KeyValue(key=key, value=str(value)) for key, value in fields.items()]
        array = DiagnosticArray(
            status=[DiagnosticStatus(level=bytes([level]), name="grood_edge", message=sentence, values=values)]
        )
        array.header.stamp = node.get_clock().now().to_msg()
        diagnostics.publish(array)
        states.publish(String(data=json.dumps(fields)))

    topic = node.declare_parameter("topic", "/image").value
    node.create_subscription(Image, topic, on_image, qos_profile_sensor_data, raw=True)  # the newest frames only
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        judge.session.close()
        node.destroy_node()


if __name__ == "__main__":
    main()
