"""The contamination gate alone: compares every domain's training rows with every domain's evaluation rows.

python -m infinite_jax.audit [--config-name NAME] [--config-dir DIR] [--again] [key=value ...]

Takes the arguments of `train` and trains nothing. Writes contamination/report.json and report.html, under run.dir if it
is given. The same comparison a second time is read from contamination.cache. The report also says whether the model
itself has memorised the evaluation prompts (contamination.memorised of each domain; 0 = not asked).

Exit codes: 0 whatever is found, unless contamination.policy=halt: then 3 where `train` would refuse to begin.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from configs.schema import located
from infinite_jax import contamination_report, gate, memorised, run_folder
from infinite_jax.session import set_up_runtime
from sharding.mesh import MeshConfig

ANY_MESH = MeshConfig(0, 0, 0, 0, 0, 0, "none")  # sizes chosen from the devices that are here


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("audit", __doc__)
    cli.add_config_arguments(arguments)
    arguments.add_argument("--again", action="store_true", help="compare even where the findings are in the cache")
    given = arguments.parse_args(argv)
    with cli.bad_input():
        config = located(cli.compose_config(given.config_name, given.config_dir, given.overrides))
        config = dataclasses.replace(config, mesh=ANY_MESH)  # it need not run where the run will
        set_up_runtime(config)
        run_folder.check_writable(Path(config.run.dir), "run.dir=")  # before what takes long
        screened = gate.screen(config, again=given.again)
        folder = Path(config.run.dir) / gate.FOLDER
        if screened.report is None:
            print("contamination.stages=[]: no stage is asked for, nothing was compared")
            return cli.DONE
        contamination_report.write(folder, screened.report)  # and again with what takes longer
        if config.contamination.memorised:
            screened.report["summary"]["memorised"] = memorised.measure(config, screened.domains)
        contamination_report.write(folder, screened.report)
    print(table(screened.report["summary"]))
    print(f"report: {folder / contamination_report.REPORT}, {folder / contamination_report.PAGE}")
    return cli.HALTED if screened.halted else cli.DONE


def table(summary: dict) -> str:
    """Stages and domains, a line each."""
    lines = [f"{'stage':<10} {'status':<19} {'training':>10} {'evaluation':>11} {'matched':>9}"]
    for stage in summary["stages"]:
        counts = f"{stage['train']:>10,} {stage['evaluation']:>11,} {stage['matched']:>9,}"
        lines.append(f"{stage['name']:<10} {stage['status']:<19} {counts}")
    width = max([6, *map(len, summary["domains"])])
    lines.append(f"\n{'domain':<{width}} {'training':>10} {'matched':>9} {'share':>8}")
    for name, domain in summary["domains"].items():
        lines.append(f"{name:<{width}} {domain['train']:>10,} {domain['matched']:>9,} {domain['share']:>8.2%}")
    if known := summary.get("memorised"):
        lines.append(f"\nmemorised by the model: {known['status']} {known['note']}".rstrip())
        for name, domain in known["domains"].items():
            gap = "no twins" if domain["gap"] is None else f"{domain['gap']:+.3f} nats a token over twins"
            lines.append(f"{name:<{width}} {domain['completed']:>8.1%} completed, {gap}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
