from .dataset import PackDataset as PackDataset
from .shard import Pack as Pack
from .writer import Record as Record
from .writer import ShardWriter as ShardWriter
from .writer import new_attributes as new_attributes
