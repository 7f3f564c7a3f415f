// SPDX-License-Identifier: GPL-2.0-only
/*
 * What differs from the base, as the kernel's map has it: changes lists the
 * ranges, map draws the whole device. Nothing is read but the partition table.
 */
#include <blkid/blkid.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cowctl.h"

/* Blocks that one question to the kernel is about. */
#define ASK_BLOCKS	(UINT64_C(1) << 32)

static const char *const kind_names[KINDS] = { "unchanged", "written", "zeroed" };

struct walk {
	const struct cow *cow;
	dev_t dev;			/* that is asked: it, or a view of it */
	uint64_t bytes;			/* of the device */
	uint64_t base_end;		/* the block it lies in is partly the base's */
	uint64_t under_end;		/* beyond it, zeroes are no change */
	struct range range;		/* not told yet */
	int (*visit)(const struct range *range, void *arg);
	void *arg;
};

static uint64_t whole_blocks(uint64_t bytes)
{
	return count_blocks(bytes) * BLOCK_BYTES;
}

static int tell(struct walk *walk)
{
	int err = 0;

	if (walk->range.end > walk->range.start)
		err = walk->visit(&walk->range, walk->arg);
	walk->range.start = walk->range.end;
	return err;
}

static int add(struct walk *walk, uint64_t end, enum kind kind)
{
	int err = 0;

	if (end > walk->bytes)
		end = walk->bytes;
	if (end <= walk->range.end)
		return 0;
	if (kind != walk->range.kind)
		err = tell(walk);
	walk->range.kind = kind;
	walk->range.end = end;
	return err;
}

static uint64_t lesser(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* What is not in the overlay: the base, and zeroes where that has ended. */
static int add_base(struct walk *walk, uint64_t end)
{
	uint64_t base_end = walk->base_end - walk->base_end % BLOCK_BYTES;
	bool more = walk->under_end > walk->base_end;

	return add(walk, lesser(end, base_end), UNCHANGED) ?:
	       add(walk, lesser(end, whole_blocks(walk->base_end)), more ? WRITTEN : UNCHANGED) ?:
	       (more ? add(walk, lesser(end, whole_blocks(walk->under_end)), ZEROED) : 0) ?:
	       add(walk, end, UNCHANGED);
}

static int add_run(struct walk *walk, uint64_t end, char kind)
{
	uint64_t zero_end = whole_blocks(walk->base_end > walk->under_end ? walk->base_end :
					 walk->under_end);

	if (kind == 'o')
		return add(walk, end, WRITTEN);
	if (kind != 'z')
		return add_base(walk, end);
	return add(walk, lesser(end, zero_end), ZEROED) ?: add(walk, end, UNCHANGED);
}

static int fail_map(const struct walk *walk, int err)
{
	return fail(err == -EINVAL ? -EIO : err, "cannot get the map of %s: %s", walk->cow->name,
		    strerror(-err));
}

static int add_answer(struct walk *walk, const char *answer)
{
	uint64_t blocks, before = walk->range.end, end = before;
	char kind;
	int ret, err;

	while ((ret = next_extent(&answer, &blocks, &kind)) > 0) {
		if (blocks > (UINT64_MAX - end) / BLOCK_BYTES)
			return fail_map(walk, -ERANGE);
		end += blocks * BLOCK_BYTES;
		err = add_run(walk, end, kind);
		if (err)
			return err;
	}
	return ret || walk->range.end == before ? fail_map(walk, -EIO) : 0;
}

/*
 * Visits all of a device, each block as it is at some time meanwhile, or as it is in
 * its view @dev. What the result is for may have more than the base has under it:
 * up to @under_end, what the device shows there counts as changed.
 */
int walk_device(const struct cow *cow, dev_t dev, uint64_t under_end,
		int (*visit)(const struct range *range, void *arg), void *arg)
{
	struct walk walk = {
		.cow = cow, .dev = dev, .bytes = cow->sectors * SECTOR_BYTES,
		.base_end = cow->status.base_size_sectors * SECTOR_BYTES,
		.under_end = under_end, .visit = visit, .arg = arg,
	};
	char *answer, message[64];
	int err = 0;

	if (!walk.base_end)	/* an older module does not tell */
		walk.base_end = walk.bytes;
	while (!err && walk.range.end < walk.bytes) {
		if (interrupted())
			return -EINTR;
		snprintf(message, sizeof(message), "extents %" PRIu64 " %" PRIu64,
			 walk.range.end / BLOCK_BYTES, ASK_BLOCKS);
		err = dm_ask(dev, message, &answer);
		if (err)
			return fail_map(&walk, err);
		err = add_answer(&walk, answer);
		free(answer);
	}
	return err ?: tell(&walk);
}

/* A visitor that only counts: @arg are the sums of each kind. */
int add_to_sums(const struct range *range, void *arg)
{
	uint64_t *sums = arg;

	sums[range->kind] += range->end - range->start;
	return 0;
}

/*
 * changes
 */

struct partition {
	int number;
	uint64_t start;
	uint64_t end;
	uint64_t changed;
};

struct changes {
	bool json;
	FILE *out;			/* JSON is kept until it is whole */
	bool any;			/* was printed */
	uint64_t changed[KINDS];
	struct partition *partitions;	/* in the order of where they start */
	int nr;
};

static int by_start(const void *a, const void *b)
{
	const struct partition *const first = a, *const second = b;

	return (first->start > second->start) - (first->start < second->start);
}

/* Those of the device as it is now, changes included; none if it has no table. */
static void find_partitions(const struct cow *cow, struct changes *changes)
{
	blkid_probe probe = NULL;
	blkid_partlist list = NULL;
	int nr;

	/* A base that is away would fail the read, or hold it. */
	if (strcmp(cow->status.health, "base-error"))
		probe = blkid_new_probe_from_filename(cow->path);
	if (!probe)
		warn("the partitions of %s cannot be read", cow->name);
	if (probe && !blkid_probe_enable_partitions(probe, 1))
		list = blkid_probe_get_partitions(probe);
	nr = list ? blkid_partlist_numof_partitions(list) : 0;
	changes->partitions = nr > 0 ? calloc(nr, sizeof(*changes->partitions)) : NULL;
	for (int i = 0; changes->partitions && i < nr; i++) {
		blkid_partition part = blkid_partlist_get_partition(list, i);
		uint64_t start = blkid_partition_get_start(part) * SECTOR_BYTES;

		/* It only contains others. */
		if (blkid_partition_is_extended(part))
			continue;
		changes->partitions[changes->nr++] = (struct partition){
			.number = blkid_partition_get_partno(part),
			.start = start,
			.end = start + blkid_partition_get_size(part) * SECTOR_BYTES,
		};
	}
	if (changes->nr)
		qsort(changes->partitions, changes->nr, sizeof(*changes->partitions), by_start);
	if (probe)
		blkid_free_probe(probe);
}

static void print_range(struct changes *changes, const struct range *range, int partition)
{
	char size[16], number[16] = "-";

	if (partition)
		snprintf(number, sizeof(number), "%d", partition);
	if (changes->json)
		fprintf(changes->out, "%s\n    { \"start\": %" PRIu64 ", \"length\": %" PRIu64
			", \"state\": \"%s\", \"partition\": %s }", changes->any ? "," : "",
			range->start, range->end - range->start, kind_names[range->kind],
			partition ? number : "null");
	else
		fprintf(changes->out, "%20" PRIu64 " %20" PRIu64 "  %-10s %-8s %s\n",
			range->start, range->end - range->start,
			human_size(range->end - range->start, size), kind_names[range->kind],
			number);
	changes->any = true;
}

static uint64_t overlap(const struct range *range, const struct partition *p)
{
	uint64_t start = range->start > p->start ? range->start : p->start;
	uint64_t end = range->end < p->end ? range->end : p->end;

	return start < end ? end - start : 0;
}

/* Prints a changed range, cut at the bounds of partitions. */
static int list_range(const struct range *range, void *arg)
{
	struct changes *changes = arg;
	struct range rest = *range;
	int i = 0;

	changes->changed[range->kind] += range->end - range->start;
	if (range->kind == UNCHANGED)
		return 0;
	/* Some tables have partitions within others. */
	for (int j = 0; j < changes->nr; j++)
		changes->partitions[j].changed += overlap(range, &changes->partitions[j]);
	while (rest.start < range->end) {
		struct partition *p = NULL;

		while (i < changes->nr && changes->partitions[i].end <= rest.start)
			i++;
		rest.end = range->end;
		if (i < changes->nr) {
			p = &changes->partitions[i];
			if (p->start > rest.start) {
				rest.end = p->start < range->end ? p->start : range->end;
				p = NULL;
			} else if (p->end < rest.end) {
				rest.end = p->end;
			}
		}
		print_range(changes, &rest, p ? p->number : 0);
		rest.start = rest.end;
	}
	return 0;
}

static void print_sums(const struct changes *changes)
{
	char written[16], zeroed[16];

	human_size(changes->changed[WRITTEN], written);
	human_size(changes->changed[ZEROED], zeroed);
	if (!changes->json) {
		fprintf(changes->out, "%s written, %s zeroed\n", written, zeroed);
		for (int i = 0; i < changes->nr; i++)
			fprintf(changes->out, "  partition %-3d %s\n",
				changes->partitions[i].number,
				human_size(changes->partitions[i].changed, written));
		return;
	}
	fprintf(changes->out, "%s],\n  \"written\": %" PRIu64 ",\n  \"zeroed\": %" PRIu64
		",\n  \"partitions\": [", changes->any ? "\n  " : "", changes->changed[WRITTEN],
		changes->changed[ZEROED]);
	for (int i = 0; i < changes->nr; i++)
		fprintf(changes->out, "%s\n    { \"number\": %d, \"start\": %" PRIu64
			", \"length\": %" PRIu64 ", \"changed\": %" PRIu64 " }", i ? "," : "",
			changes->partitions[i].number, changes->partitions[i].start,
			changes->partitions[i].end - changes->partitions[i].start,
			changes->partitions[i].changed);
	fprintf(changes->out, "%s]\n}\n", changes->nr ? "\n  " : "");
}

static int list_changes(const struct cow *cow, struct changes *changes)
{
	int err;

	if (changes->json)
		fprintf(changes->out, "{\n  \"ranges\": [");
	else
		fprintf(changes->out, "%20s %20s  %-10s %-8s %s\n", "START", "LENGTH", "", "STATE",
			"PARTITION");
	err = walk_device(cow, makedev(cow->major, cow->minor), 0, list_range, changes);
	if (!err)
		print_sums(changes);
	return err;
}

int cmd_changes(const struct args *args)
{
	struct changes changes = { .json = args->json, .out = stdout };
	char *text = NULL;
	struct cow cow;
	size_t size;
	int err = find_cow(args, &cow);

	if (err)
		return err;
	find_partitions(&cow, &changes);
	/* The device may go away meanwhile, and half a JSON is of no use. */
	if (changes.json)
		changes.out = open_memstream(&text, &size);
	err = changes.out ? list_changes(&cow, &changes) : fail(-ENOMEM, "out of memory");
	if (changes.json && changes.out) {
		bool failed = ferror(changes.out);

		if ((fclose(changes.out) || failed) && !err)
			err = fail(-ENOMEM, "out of memory");
	}
	if (!err && text)
		fputs(text, stdout);
	free(text);
	free(changes.partitions);
	return err;
}

/*
 * map
 */

#define MAP_ROWS	16
#define MAP_COLUMNS	64
#define SVG_ROWS	64
#define SVG_COLUMNS	128
#define SVG_CELL	8		/* pixels */
#define SHADES		4		/* of a cell with changes */

struct drawing {
	int rows;
	int columns;
	double cell_bytes;
	uint64_t sums[KINDS];
	double (*cells)[KINDS];		/* bytes of each kind */
};

/* Adds a changed range to the cells it lies in. */
static int draw_range(const struct range *range, void *arg)
{
	struct drawing *drawing = arg;
	double start = range->start, end = range->end;
	int cells = drawing->rows * drawing->columns;

	drawing->sums[range->kind] += range->end - range->start;
	for (int i = start / drawing->cell_bytes; i < cells && range->kind != UNCHANGED; i++) {
		double first = i * drawing->cell_bytes, last = first + drawing->cell_bytes;

		if (first >= end)
			break;
		drawing->cells[i][range->kind] += (last < end ? last : end) -
						  (first > start ? first : start);
	}
	return 0;
}

/* Return: what most of the changes in a cell are; their share in *@shade, from 1 on. */
static enum kind look(const struct drawing *drawing, int cell, int *shade)
{
	const double *bytes = drawing->cells[cell];
	double changed = bytes[WRITTEN] + bytes[ZEROED];

	*shade = 0;
	if (!changed)
		return UNCHANGED;
	/* the last one only where nothing is left */
	*shade = 1 + (int)((SHADES - 1) * changed / drawing->cell_bytes);
	return bytes[WRITTEN] >= bytes[ZEROED] ? WRITTEN : ZEROED;
}

static int draw(const struct cow *cow, struct drawing *drawing)
{
	int cells = drawing->rows * drawing->columns;

	drawing->cell_bytes = (double)cow->sectors * SECTOR_BYTES / cells;
	drawing->cells = calloc(cells, sizeof(*drawing->cells));
	return drawing->cells ? walk_device(cow, makedev(cow->major, cow->minor), 0, draw_range,
					    drawing) :
	       fail(-ENOMEM, "out of memory");
}

static void print_legend(const struct cow *cow, const struct drawing *drawing)
{
	char size[16], cell[16], written[16], zeroed[16];

	printf("%s: %s, of which %s are written and %s zeroed; a character is %s\n", cow->name,
	       human_size(cow->sectors * SECTOR_BYTES, size),
	       human_size(drawing->sums[WRITTEN], written),
	       human_size(drawing->sums[ZEROED], zeroed), human_size(drawing->cell_bytes, cell));
}

static void print_drawing(const struct cow *cow, const struct drawing *drawing)
{
	static const char *const marks[KINDS][SHADES + 1] = {
		[UNCHANGED] = { "." },
		[WRITTEN] = { "", "-", "+", "*", "#" },
		[ZEROED] = { "", "o", "o", "o", "0" },
	};
	static const char *const colours[KINDS] = { "\033[2m", "\033[33m", "\033[36m" };
	bool colour = terminal_takes_colour();
	int shade;

	print_legend(cow, drawing);
	for (int i = 0; i < drawing->rows * drawing->columns; i++) {
		enum kind kind = look(drawing, i, &shade);

		if (colour)
			fputs(colours[kind], stdout);
		fputs(marks[kind][shade], stdout);
		if (colour)
			fputs("\033[0m", stdout);
		if (i % drawing->columns == drawing->columns - 1)
			putchar('\n');
	}
	printf("%s unchanged; written: from %s little to %s all of it; %s and %s zeroed\n",
	       marks[UNCHANGED][0], marks[WRITTEN][1], marks[WRITTEN][SHADES],
	       marks[ZEROED][1], marks[ZEROED][SHADES]);
}

static void print_escaped(FILE *f, const char *text)
{
	for (; *text; text++) {
		if (strchr("<>&\"'", *text))
			fprintf(f, "&#%d;", *text);
		else
			putc(*text, f);
	}
}

static void print_svg(FILE *f, const struct cow *cow, const struct drawing *drawing)
{
	static const char *const colours[KINDS] = { "#e8e8e8", "#d1681d", "#2b7bba" };
	int width = drawing->columns * SVG_CELL, height = drawing->rows * SVG_CELL, shade;
	char size[16], cell[16], written[16], zeroed[16];

	fputs("<svg xmlns=\"http://www.w3.org/2000/svg\" font-family=\"sans-serif\"", f);
	fprintf(f, " font-size=\"14\" viewBox=\"0 0 %d %d\">\n<title>", width, height + 24);
	print_escaped(f, cow->name);
	fprintf(f, "</title>\n<rect width=\"%d\" height=\"%d\" fill=\"%s\"/>\n", width, height,
		colours[UNCHANGED]);
	for (int i = 0; i < drawing->rows * drawing->columns; i++) {
		enum kind kind = look(drawing, i, &shade);

		if (kind == UNCHANGED)
			continue;
		fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\"",
			i % drawing->columns * SVG_CELL, i / drawing->columns * SVG_CELL,
			SVG_CELL, SVG_CELL);
		fprintf(f, " fill=\"%s\" fill-opacity=\"%.2f\"/>\n", colours[kind],
			0.25 + 0.75 * shade / SHADES);
	}
	fprintf(f, "<text y=\"%d\">", height + 18);
	print_escaped(f, cow->name);
	fprintf(f, ": %s; <tspan fill=\"%s\">%s written</tspan>, ",
		human_size(cow->sectors * SECTOR_BYTES, size), colours[WRITTEN],
		human_size(drawing->sums[WRITTEN], written));
	fprintf(f, "<tspan fill=\"%s\">%s zeroed</tspan>; a square is %s</text>\n</svg>\n",
		colours[ZEROED], human_size(drawing->sums[ZEROED], zeroed),
		human_size(drawing->cell_bytes, cell));
}

/*
 * The name of a file until it is whole, so that what it replaces, *@real or else @path, is
 * not lost; NULL for what is written to as it is, because it is no file, or none with a
 * name, as /dev/stdout may be. A link that the kernel does not follow is replaced itself.
 */
static char *part_name(const char *path, char **real)
{
	struct stat st;

	*real = NULL;
	if (stat(path, &st))
		return xasprintf("%s.cowctl-part", path);
	*real = realpath(path, NULL);
	return *real && S_ISREG(st.st_mode) ? xasprintf("%s.cowctl-part", *real) : NULL;
}

static int write_svg(const char *path, const struct cow *cow, const struct drawing *drawing)
{
	char *real, *part = part_name(path, &real);
	int fd, error;
	sigset_t set;
	FILE *f;

	stop_signals(&set);
	sigprocmask(SIG_BLOCK, &set, NULL);
	/* Who may write to the directory may have put anything there by that name. */
	if (part)
		unlink(part);
	fd = part ? open(part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666) :
	     open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
	f = fd < 0 ? NULL : fdopen(fd, "w");
	error = f ? 0 : errno;
	if (f) {
		print_svg(f, cow, drawing);
		if (fflush(f) || ferror(f))
			error = errno ?: EIO;
		if (fclose(f) && !error)
			error = errno;
	}
	if (part && !error && rename(part, real ?: path))
		error = errno;
	if (part && error)
		unlink(part);
	sigprocmask(SIG_UNBLOCK, &set, NULL);
	free(part);
	free(real);
	return error ? fail(io_error(error), "cannot write %s: %s", path, strerror(error)) : 0;
}

int cmd_map(const struct args *args)
{
	const char *output = args->value[KEY_OUTPUT];
	struct drawing drawing = {
		.rows = output ? SVG_ROWS : MAP_ROWS,
		.columns = output ? SVG_COLUMNS : MAP_COLUMNS,
	};
	struct cow cow;
	int err = args->json ? fail(-EINVAL, "map: there is no JSON of it; see changes") :
		  find_cow(args, &cow) ?: draw(&cow, &drawing);

	if (!err && output) {
		umask(args->umask);
		err = write_svg(output, &cow, &drawing);
	} else if (!err) {
		print_drawing(&cow, &drawing);
	}
	free(drawing.cells);
	return err;
}
