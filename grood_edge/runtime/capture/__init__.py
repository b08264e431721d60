"""From a camera, video or recording to frames with their times: sources, which frames are kept, which are healthy."""
