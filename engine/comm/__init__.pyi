from .choose import connect as connect
from .communicator import Communicator as Communicator
from .communicator import SharedError as SharedError
from .communicator import Stopped as Stopped
from .launch import Launch as Launch
from .launch import detect_launch as detect_launch
