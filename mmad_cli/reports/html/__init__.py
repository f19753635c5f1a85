"""The HTML report: one file that needs no network, made from runs and the pictures that a stage hands in."""

from mmad_cli.reports.html.build import render_html
from mmad_cli.reports.html.model import PictureSource, RunInput, Scene, ScoredMap

__all__ = ["PictureSource", "RunInput", "Scene", "ScoredMap", "render_html"]
