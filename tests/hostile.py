"""What a file must not be able to do."""

import os


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker, function=exec):
        self.marker, self.function = str(marker), function

    def __reduce__(self):
        return self.function, (
            (f"touch {self.marker}" if self.function is os.system else f"open({self.marker!r}, 'w').close()"),
        )
