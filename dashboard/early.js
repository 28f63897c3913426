// Before anything is drawn: the theme that this browser was told, so that no other flashes up.
{
  const kept = localStorage.getItem('orchestrator.theme');
  if (kept) document.documentElement.dataset.theme = kept;
}
