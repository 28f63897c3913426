# Analyses every PDB structure that was uploaded: size, centre of mass, radius of
# gyration, contacts; and, if there are several, the contacts between each two.
# Writes table.txt. Needs bash and awk only.
set -eu

for structure in *.pdb; do
    test -e "$structure" || { echo "no .pdb file was uploaded" >&2; exit 2; }
done

awk -f analyse.awk -- *.pdb > table.txt
cat table.txt
