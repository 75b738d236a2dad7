from .api import (
    Checkpoint as Checkpoint,
)
from .api import (
    Converted as Converted,
)
from .api import (
    CostTable as CostTable,
)
from .api import (
    DataConfig as DataConfig,
)
from .api import (
    Decisions as Decisions,
)
from .api import (
    DeviceCosts as DeviceCosts,
)
from .api import (
    DfsError as DfsError,
)
from .api import (
    DynamicConfig as DynamicConfig,
)
from .api import (
    DynamicResNet as DynamicResNet,
)
from .api import (
    Evaluation as Evaluation,
)
from .api import (
    Images as Images,
)
from .api import (
    Manifest as Manifest,
)
from .api import (
    Observer as Observer,
)
from .api import (
    Preprocessing as Preprocessing,
)
from .api import (
    Source as Source,
)
from .api import (
    Splits as Splits,
)
from .api import (
    SweepConfig as SweepConfig,
)
from .api import (
    SynthesisConfig as SynthesisConfig,
)
from .api import (
    TuningConfig as TuningConfig,
)
from .api import (
    convert as convert,
)
from .api import (
    cost_report as cost_report,
)
from .api import (
    default_tuning as default_tuning,
)
from .api import (
    evaluate as evaluate,
)
from .api import (
    export_onnx as export_onnx,
)
from .api import (
    load as load,
)
from .api import (
    load_model as load_model,
)
from .api import (
    measure_costs as measure_costs,
)
from .api import (
    plan as plan,
)
from .api import (
    profile as profile,
)
from .api import (
    recalibrate as recalibrate,
)
from .api import (
    save as save,
)
from .api import (
    sweep as sweep,
)

__all__: list[str]
__version__: str
