# Contacts: two residues of one structure, at least three apart, or of two structures,
# that have heavy atoms within 4.5 Angstrom of each other.

BEGIN {
    cutoff = 4.5 * 4.5
    mass["C"] = 12.011; mass["N"] = 14.007; mass["O"] = 15.999
    mass["S"] = 32.06;  mass["P"] = 30.974; mass["SE"] = 78.971
}

FNR == 1 { structures++; title[structures] = FILENAME; order = 0; last = "" }

/^(ATOM  |HETATM)/ {
    element = toupper(substr($0, 77, 2)); gsub(/ /, "", element)
    if (element == "") element = substr($0, 14, 1)
    if (element == "H" || element == "D") next
    residue = substr($0, 18, 10)
    if (residue != last) { order++; last = residue }
    n = ++atoms[structures]
    x[structures, n] = substr($0, 31, 8) + 0
    y[structures, n] = substr($0, 39, 8) + 0
    z[structures, n] = substr($0, 47, 8) + 0
    m[structures, n] = (element in mass) ? mass[element] : 12.011
    of[structures, n] = order
    residues[structures] = order
}

function contacts(a, b,    i, j, dx, dy, dz, key, seen, count) {
    for (i = 1; i <= atoms[a]; i++)
        for (j = 1; j <= atoms[b]; j++) {
            if (a == b && of[b, j] < of[a, i] + 3) continue
            dx = x[a, i] - x[b, j]; if (dx > 4.5 || dx < -4.5) continue
            dy = y[a, i] - y[b, j]; dz = z[a, i] - z[b, j]
            if (dx * dx + dy * dy + dz * dz > cutoff) continue
            key = of[a, i] SUBSEP of[b, j]
            if (!(key in seen)) { seen[key] = 1; count++ }
        }
    return count + 0
}

function describe(s,    i, total, cx, cy, cz, spread) {
    for (i = 1; i <= atoms[s]; i++) {
        total += m[s, i]
        cx += m[s, i] * x[s, i]; cy += m[s, i] * y[s, i]; cz += m[s, i] * z[s, i]
    }
    cx /= total; cy /= total; cz /= total
    for (i = 1; i <= atoms[s]; i++)
        spread += m[s, i] * ((x[s, i] - cx) ^ 2 + (y[s, i] - cy) ^ 2 + (z[s, i] - cz) ^ 2)
    printf "%-24s %8d %6d %8.2f %8.2f %8.2f %7.2f %9d\n", title[s], residues[s], atoms[s],
        cx, cy, cz, sqrt(spread / total), contacts(s, s)
}

END {
    printf "%-24s %8s %6s %8s %8s %8s %7s %9s\n", "structure", "residues", "atoms",
        "centre x", "y", "z", "Rg", "contacts"
    for (s = 1; s <= structures; s++) describe(s)
    for (a = 1; a < structures; a++)
        for (b = a + 1; b <= structures; b++)
            printf "contacts between %s and %s: %d\n", title[a], title[b], contacts(a, b)
}
