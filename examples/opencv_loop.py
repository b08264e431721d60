"""The shortest loop, for what OpenCV opens: no frame health (a black frame is scored), no decision over time.

robot_loop.py has both.

python opencv_loop.py model.onnx 0   (or a video file)
"""

import sys

import cv2

from grood_edge.runtime import open_session

source = int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2]
camera = cv2.VideoCapture(source)
with open_session(sys.argv[1], color="bgr") as session:
    while True:
        there, frame = camera.read()
        if not there:
            break
        verdict = session.predict(frame)
        name = "unknown" if verdict.is_ood else verdict.class_name
        print(f"{name:>12}  p {verdict.p_value:.3f}  score {verdict.ood_score:+.2f}")
camera.release()
