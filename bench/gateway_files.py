"""The configuration the gateway is measured with: everything on, one upstream, two agents.

Not an example to copy: the caps are sky-high, so that every call is reckoned against them and none refused.
"""

from pathlib import Path
from string import Template

from bench import wire

CONFIG = Template("""\
[server]
data  = "$host:$data_port"
admin = "$host:$admin_port"

[upstreams.mock]
kind     = "compatible"
base_url = "http://$host:$mock_port/v1"

[agents.$fast_agent]
finetuned = "mock/fast-finetuned"
baseline  = "mock/fast-baseline"
defaults  = { temperature = 0.7, max_tokens = 4096 }

[agents.$paced_agent]
finetuned = "mock/$paced-finetuned"
baseline  = "mock/$paced-baseline"
defaults  = { temperature = 0.7, max_tokens = 4096 }

[prices."mock/*"]
input_usd_per_mtok  = "0.80"
output_usd_per_mtok = "0.80"

[store]
url = "sqlite:///$dir/gateway.db"

[journal]
dir  = "$dir/journal"
sync = "write"
""")

POLICY = """\
[models]
use_finetuned    = true
fallback_enabled = true

[ab_testing]
enabled            = true
rollout_percentage = 50

[[caps]]
scope = "global"
per   = "hour"
usd   = "1000000"

[[caps]]
scope = "agent"
per   = "day"
usd   = "1000000"
"""

ROUTING = Template("""\
default_agent = "$fast_agent"

[[rules]]
name     = "returns"
agent    = "$fast_agent"
priority = 50
any_word = ["return", "refund"]
why      = "asks about returns"
""")

ENVIRONMENT = "dev"


def write(directory: Path, *, mock_port: int, data_port: int, admin_port: int) -> list[str]:
    """Writes the files and returns the arguments of `gateway` that serve them."""
    names = {"fast_agent": wire.FAST_AGENT, "paced_agent": wire.PACED_AGENT, "paced": wire.PACED}
    ports = {"mock_port": mock_port, "data_port": data_port, "admin_port": admin_port}
    config, policies = directory / "config.toml", directory / "policies"
    policies.mkdir()
    config.write_text(CONFIG.substitute(names, **ports, host=wire.HOST, dir=directory))
    (policies / f"{ENVIRONMENT}.toml").write_text(POLICY)
    (policies / "routing.toml").write_text(ROUTING.substitute(names))
    return ["serve", "--config", str(config), "--policies", str(policies), "--env", ENVIRONMENT]
