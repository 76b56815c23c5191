"""phi3-mlx publish"""

from __future__ import annotations

import click

from .options import in_options
from .terminal import note, say, show


@click.command()
@click.argument("directory", metavar="DIR")
@click.argument("repo_id", metavar="OWNER/REPO")
@click.option("--public", is_flag=True, help="Everybody may see it. Without it: you alone.")
@click.option("--dry-run", is_flag=True, help="Show what would go where, and the model card; send nothing.")
@click.option("--base", metavar="OWNER/REPO", help="What it was made of, where its files do not say.")
@click.option("--licence", metavar="NAME", help="Its licence, where the base's is not known: mit.")
@click.option("--results", metavar="FILE", help="The results.json of an evaluation, or its directory.")
def publish(
    directory: str,
    repo_id: str,
    public: bool,
    dry_run: bool,
    base: str | None,
    licence: str | None,
    results: str | None,
) -> None:
    """Upload a model, an adapter or GGUF files to the Hugging Face hub.

    DIR is what convert, fuse or tune has written, or a folder of GGUF files. Only files that belong there go, with a
    model card of what is known. Log in with `hf auth login`. Run again, an upload that was cut goes on.

    \b
    phi3-mlx publish fused me/my-phi --dry-run
    phi3-mlx publish fused me/my-phi
    """
    from ..publishing.upload import publish as work
    from ..sizes import size_text

    def progress(name: str, count: int, total: int) -> None:
        say(f"{count + 1} of {total}: {name}" if name else "the commit, by which all appear")

    done = work(
        directory,
        repo_id,
        public=public,
        dry_run=dry_run,
        base=base,
        licence=licence,
        results=results,
        progress=progress,
    )
    for sentence in done.notes:
        note(in_options(sentence, click.get_current_context().command))
    seen = "public" if done.public else "private"
    if dry_run:
        for name, size in done.files.items():
            show(f"{size_text(size):>10}  {name}")
        show(f"\n{done.card}")
        say(f"nothing was sent; without --dry-run these {len(done.files)} files go to {done.url}, {seen}")
        return
    say(f"{done.url} has {len(done.files)} files, {size_text(sum(done.files.values()))}, {seen}")
