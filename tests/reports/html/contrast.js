// Texts whose contrast with what is behind them is below `least` to 1 (WCAG 2.1, success criterion 1.4.3: 4.5).
((least) => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data;
  };
  const linear = (value) => (value / 255 <= 0.03928 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255];
  };
  const poor = new Set();
  for (const node of document.querySelectorAll("main *, header *")) {
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!hasText || !node.getClientRects().length || node.closest("option") || node.disabled) continue;
    const style = getComputedStyle(node);
    const levels = [luminance(parse(node instanceof SVGElement ? style.fill : style.color)), luminance(behind(node))];
    const ratio = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
    if (ratio < least) poor.add(`${node.tagName}.${node.getAttribute("class")} ${ratio.toFixed(2)}: ${node.textContent.slice(0, 30)}`);
  }
  return [...poor];
})
