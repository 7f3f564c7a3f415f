// SPDX-License-Identifier: GPL-2.0-only
/*
 * top and status --watch: what happens to all devices, or to one, from look to look.
 *
 * On a terminal the table is drawn over itself; the few escape sequences that
 * this takes are known to every terminal, and need no library. Elsewhere each look adds lines.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <limits.h>
#include <locale.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <wchar.h>

#include "cowctl.h"

#define SPAN		10	/* looks that the growth is an average of */
#define BAR_WIDTH	8
#define LEAST_NAME	8
#define CELL_BYTES	24
#define TOTAL_LIMIT	"/sys/module/dm_nbdcow/parameters/total_limit"

/* A device as it was at one look, and what had happened since the one before. */
struct look {
	char name[NAME_BYTES];
	char uuid[NAME_BYTES + 2];
	dev_t dev;
	struct cow_status status;
	struct json_object *json;	/* as the other commands report it, or NULL */
	struct {
		int64_t ms;
		uint64_t used;
	} past[SPAN + 1];		/* up to this one */
	int nr_past;
	double growth;			/* in bytes per second, as all of these */
	double overlay;
	double hits;
	double misses;
	double base;
};

struct top {
	const struct args *args;
	uint64_t delay_ms;
	uint64_t count;			/* 0: until told to end */
	int (*order)(const void *a, const void *b);
	bool screen;			/* draw over what was there */
	bool colour;
	bool begun;			/* the heading is there */
	struct timespec when;		/* this look is, on the wall */
	int64_t ms;			/* the same, by the clock of now_ms() */
	struct look *looks;
	size_t nr;
	struct look *before;		/* those of the last time */
	size_t nr_before;
};

static bool has_limit(const struct look *look)
{
	return look->status.limit_blocks != NO_LIMIT;
}

/* Devices have names that others may get, and need not have a UUID. */
static const struct look *find_before(const struct top *top, const struct look *look)
{
	for (size_t i = 0; i < top->nr_before; i++) {
		/* mostly they are where they were */
		const struct look *before = &top->before[(top->nr + i) % top->nr_before];

		if (before->dev == look->dev && !strcmp(before->uuid, look->uuid))
			return before;
	}
	return NULL;
}

/* A counter that has begun anew tells nothing. */
static double rate(uint64_t before, uint64_t now, int64_t ms)
{
	return ms > 0 && now > before ? (now - before) * 1000.0 * SECTOR_BYTES / ms : 0;
}

static void compare(struct look *look, const struct look *before)
{
	const struct cow_status *then = &before->status, *now = &look->status;
	int skip = before->nr_past > SPAN, nr = before->nr_past - skip;
	int64_t ms = look->past[0].ms - before->past[before->nr_past - 1].ms;

	look->overlay = rate(then->overlay_sectors, now->overlay_sectors, ms);
	look->hits = rate(then->hit_sectors, now->hit_sectors, ms);
	look->misses = rate(then->missed_sectors, now->missed_sectors, ms);
	look->base = rate(then->base_sectors, now->base_sectors, ms);

	look->past[nr] = look->past[0];
	memcpy(look->past, before->past + skip, nr * sizeof(look->past[0]));
	look->nr_past = nr + 1;
	ms = look->past[nr].ms - look->past[0].ms;
	if (ms > 0)
		look->growth = ((double)look->past[nr].used - look->past[0].used) * 1000 / ms;
}

static int add_look(const struct cow *cow, void *arg)
{
	struct top *top = arg;
	struct look *looks = reallocarray(top->looks, top->nr + 1, sizeof(*looks)), *look;
	const struct look *before;

	if (!looks)
		return fail(-ENOMEM, "out of memory");
	top->looks = looks;
	look = &looks[top->nr];
	*look = (struct look){
		.dev = makedev(cow->major, cow->minor),
		.status = cow->status,
		.json = top->args->json ? describe(cow) : NULL,
		.past[0] = { top->ms, cow->status.used_blocks * BLOCK_BYTES },
		.nr_past = 1,
	};
	snprintf(look->name, sizeof(look->name), "%s", cow->name);
	snprintf(look->uuid, sizeof(look->uuid), "%s", cow->uuid);
	before = find_before(top, look);
	if (before)
		compare(look, before);
	top->nr++;
	return 0;
}

static void forget(struct look **looks, size_t *nr)
{
	for (size_t i = 0; i < *nr; i++)
		json_object_put((*looks)[i].json);
	free(*looks);
	*looks = NULL;
	*nr = 0;
}

/* Looks at all devices, or the one that is named. */
static int take_look(struct top *top)
{
	struct cow cow;

	forget(&top->before, &top->nr_before);
	top->before = top->looks;
	top->nr_before = top->nr;
	top->looks = NULL;
	top->nr = 0;
	top->ms = now_ms();
	clock_gettime(CLOCK_REALTIME, &top->when);
	if (!top->args->named)
		return dm_each(add_look, top);
	return find_cow(top->args, &cow) ?: add_look(&cow, top);
}

static int by_name(const void *a, const void *b)
{
	const struct look *const *first = a, *const *second = b;

	return strcmp((*first)->name, (*second)->name);
}

static int by_used(const void *a, const void *b)
{
	const struct look *const *first = a, *const *second = b;
	uint64_t one = (*first)->status.used_blocks, other = (*second)->status.used_blocks;

	return one == other ? by_name(a, b) : one < other ? 1 : -1;
}

static int by_rate(const void *a, const void *b)
{
	const struct look *const *first = a, *const *second = b;
	double one = (*first)->growth, other = (*second)->growth;

	return one == other ? by_used(a, b) : one < other ? 1 : -1;
}

/* Return: seconds until the limit is reached if it goes on like this, or -1. */
static double seconds_left(const struct look *look)
{
	uint64_t used = look->status.used_blocks, limit = look->status.limit_blocks;

	if (!has_limit(look))
		return -1;
	if (used >= limit)
		return 0;
	return look->growth > 0 ? (double)(limit - used) * BLOCK_BYTES / look->growth : -1;
}

/*
 * What is shown
 */

enum column {
	USED, LIMIT, BAR, PERCENT, GROWTH, FULL_IN, OVERLAY, CACHE, BASE, ERRORS, HEALTH,
	COLUMNS
};

/* Where not all have room, those of a higher rank are left out. */
static const struct {
	const char *head;
	int width;
	int rank;
} columns[COLUMNS] = {
	[USED] = { "USED", 5, 0 },
	[LIMIT] = { "LIMIT", 5, 6 },
	[BAR] = { "", BAR_WIDTH, 2 },
	[PERCENT] = { "USE%", 4, 1 },
	[GROWTH] = { "GROWTH", 6, 3 },
	[FULL_IN] = { "FULL", 4, 4 },
	[OVERLAY] = { "OVERLAY", 7, 8 },
	[CACHE] = { "CACHE", 5, 9 },
	[BASE] = { "BASE", 5, 7 },
	[ERRORS] = { "ERRORS", 6, 5 },
	[HEALTH] = { "HEALTH", 10, 10 },
};

/* With the sign of a rate that can have one. */
static const char *rate_text(double rate, char buf[CELL_BYTES])
{
	char size[16];

	short_size(rate < 0 ? -rate : rate, size);
	snprintf(buf, CELL_BYTES, "%s%s", rate <= -1 ? "-" : "", size);
	return buf;
}

static const char *time_text(double seconds, char buf[CELL_BYTES])
{
	static const struct {
		char name;
		int seconds;
		int most;
	} units[] = { { 's', 1, 99 }, { 'm', 60, 99 }, { 'h', 3600, 48 }, { 'd', 86400, 999 } };

	for (size_t i = 0; seconds >= 0 && i < sizeof(units) / sizeof(units[0]); i++) {
		double number = seconds / units[i].seconds;

		if (number > units[i].most)
			continue;
		snprintf(buf, CELL_BYTES, "%.0f%c", number, units[i].name);
		return buf;
	}
	return "-";
}

static double percent(const struct look *look)
{
	uint64_t used = look->status.used_blocks, limit = look->status.limit_blocks;

	return limit ? 100.0 * used / limit : 100;
}

static void draw_bar(const struct look *look, char cell[CELL_BYTES])
{
	int filled = percent(look) * BAR_WIDTH / 100;

	memset(cell, '.', BAR_WIDTH);
	memset(cell, '#', filled < BAR_WIDTH ? filled : BAR_WIDTH);
	cell[BAR_WIDTH] = '\0';
}

static void fill_cell(const struct look *look, enum column column, char cell[CELL_BYTES])
{
	const struct cow_status *status = &look->status;
	const char *text = "-";
	char buf[CELL_BYTES];

	switch (column) {
	case USED:
		text = short_size(status->used_blocks * BLOCK_BYTES, buf);
		break;
	case LIMIT:
		text = !has_limit(look) ? "none" :
		       short_size(status->limit_blocks * BLOCK_BYTES, buf);
		break;
	case BAR:
		text = "";
		if (has_limit(look)) {
			draw_bar(look, cell);
			return;
		}
		break;
	case PERCENT:
		if (has_limit(look)) {
			snprintf(cell, CELL_BYTES, "%.0f%%", percent(look));
			return;
		}
		break;
	case FULL_IN:
		text = time_text(seconds_left(look), buf);
		break;
	case ERRORS:
		snprintf(cell, CELL_BYTES, "%" PRIu64,
			 status->base_errors + status->writes_refused);
		return;
	case HEALTH:
		text = status->health;
		break;
	default:
		/* The first time there is nothing to compare with. */
		if (look->nr_past > 1)
			text = rate_text(column == GROWTH ? look->growth :
					 column == OVERLAY ? look->overlay :
					 column == CACHE ? look->hits :
					 look->base + look->misses, buf);
	}
	snprintf(cell, CELL_BYTES, "%s", text);
}

/* Return: how many bytes of @name fit into @room columns; in *@width how many they take. */
static int fit(const char *name, int room, int *width)
{
	int bytes = 0, length;
	wchar_t c;

	for (*width = 0; name[bytes]; bytes += length) {
		int taken = 1;

		length = mbtowc(&c, name + bytes, strlen(name + bytes));
		if (length < 1)
			length = 1;
		else if (wcwidth(c) >= 0)
			taken = wcwidth(c);
		if (*width + taken > room)
			break;
		*width += taken;
	}
	return bytes;
}

/* Which columns there is room for, with the width of the first, the name. */
struct layout {
	bool shown[COLUMNS];
	int name_width;
};

static void lay_out(const struct top *top, int room, struct layout *layout)
{
	int longest = LEAST_NAME, width;

	for (size_t i = 0; i < top->nr; i++) {
		fit(top->looks[i].name, INT_MAX, &width);
		if (width > longest)
			longest = width;
	}
	*layout = (struct layout){ .name_width = longest };
	if (!top->screen) {
		memset(layout->shown, true, sizeof(layout->shown));
		return;
	}
	room -= LEAST_NAME;
	for (int rank = 0; rank < COLUMNS; rank++)
		for (int c = 0; c < COLUMNS; c++)
			if (columns[c].rank == rank && columns[c].width < room) {
				layout->shown[c] = true;
				room -= columns[c].width + 1;
			}
	room += LEAST_NAME;
	if (longest > room)
		layout->name_width = room > 1 ? room : 1;
}

static void draw_name(const char *name, int room)
{
	int width, bytes = fit(name, room, &width);

	/* + for what is left out */
	if (name[bytes])
		bytes = fit(name, room - 1, &width);
	printf("%.*s%-*s", bytes, name, room - width, name[bytes] ? "+" : "");
}

static void draw_head(const struct layout *layout)
{
	draw_name("NAME", layout->name_width);
	for (int c = 0; c < COLUMNS; c++)
		if (layout->shown[c])
			printf(" %*s", columns[c].width, columns[c].head);
	putchar('\n');
}

static void draw_row(const struct top *top, const struct look *look, const struct layout *layout)
{
	const char *health = look->status.health;
	bool colour = top->colour && strcmp(health, "ok");
	char cell[CELL_BYTES];

	if (colour)
		fputs(strcmp(health, "high") ? "\033[31m" : "\033[33m", stdout);
	draw_name(look->name, layout->name_width);
	for (int c = 0; c < COLUMNS; c++)
		if (layout->shown[c]) {
			fill_cell(look, c, cell);
			printf(" %*s", columns[c].width, cell);
		}
	fputs(colour ? "\033[0m\n" : "\n", stdout);
}

/* In blocks; the module takes what limit= does not: 0, 200% and what memparse() knows. */
static uint64_t total_limit(void)
{
	static const char units[] = "KMGTPE";
	char text[32], *end, *unit;
	struct sysinfo info;
	uint64_t number;

	if (read_line(TOTAL_LIMIT, text, sizeof(text)) || !strcmp(text, "none"))
		return NO_LIMIT;
	number = strtoull(text, &end, 0);
	unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
	if (unit)
		number <<= 10 * (unit - units + 1);
	if (*end == '%') {
		sysinfo(&info);
		number *= (uint64_t)info.totalram * info.mem_unit / 100;
	}
	return number / BLOCK_BYTES;
}

/* All devices as if they were one; they have a limit together. */
static struct look add_up(const struct top *top)
{
	static const char *const healths[] = { "ok", "high", "full", "base-error" };
	struct look sum = { .status.limit_blocks = total_limit() };
	int worst = 0;

	snprintf(sum.name, sizeof(sum.name), "all %zu", top->nr);
	for (size_t i = 0; i < top->nr; i++) {
		const struct look *look = &top->looks[i];

		sum.status.used_blocks += look->status.used_blocks;
		sum.status.base_errors += look->status.base_errors;
		sum.status.writes_refused += look->status.writes_refused;
		for (int j = worst; j < 4; j++)
			if (!strcmp(look->status.health, healths[j]))
				worst = j;
		if (look->nr_past > sum.nr_past)
			sum.nr_past = look->nr_past;
		sum.growth += look->growth;
		sum.overlay += look->overlay;
		sum.hits += look->hits;
		sum.misses += look->misses;
		sum.base += look->base;
	}
	strcpy(sum.status.health, healths[worst]);
	return sum;
}

/* Those that have no room are the last of the order, and counted. */
static void draw_screen(const struct top *top, const struct look *const *sorted)
{
	struct winsize window = { 0 };
	struct layout layout;
	struct look sum;
	size_t rows;

	ioctl(STDOUT_FILENO, TIOCGWINSZ, &window);
	if (!window.ws_col || !window.ws_row)
		window = (struct winsize){ .ws_col = 80, .ws_row = 24 };
	/* Two lines are above them, and the cursor is below. */
	rows = window.ws_row > 4 ? window.ws_row - 3 : 1;
	if (rows < top->nr)
		rows--;
	lay_out(top, window.ws_col, &layout);
	/* What is too wide after all is not to become two lines. */
	fputs("\033[H\033[?7l\033[K", stdout);
	draw_head(&layout);
	if (!top->args->named) {
		sum = add_up(top);
		fputs("\033[K", stdout);
		draw_row(top, &sum, &layout);
	}
	for (size_t i = 0; i < top->nr && i < rows; i++) {
		fputs("\033[K", stdout);
		draw_row(top, sorted[i], &layout);
	}
	if (rows < top->nr)
		printf("\033[Kand %zu more\n", top->nr - rows);
	fputs("\033[J\033[?7h", stdout);
}

static void add_lines(struct top *top, const struct look *const *sorted)
{
	struct layout layout;
	char clock[16];

	strftime(clock, sizeof(clock), "%T", localtime(&top->when.tv_sec));
	lay_out(top, 0, &layout);
	if (!top->begun) {
		printf("%-8s ", "TIME");
		draw_head(&layout);
	}
	top->begun = true;
	for (size_t i = 0; i < top->nr; i++) {
		printf("%s ", clock);
		draw_row(top, sorted[i], &layout);
	}
}

static struct json_object *rounded(double value)
{
	value += value < 0 ? -0.5 : 0.5;
	return json_object_new_int64(value < INT64_MAX ? (int64_t)value : INT64_MAX);
}

/* What the device is, as everywhere, and what it does. */
static struct json_object *describe_look(const struct look *look)
{
	struct json_object *object = json_object_get(look->json), *rates = NULL;
	double left = seconds_left(look);

	if (look->nr_past > 1) {
		rates = json_object_new_object();
		json_object_object_add(rates, "used", rounded(look->growth));
		json_object_object_add(rates, "overlay_reads", rounded(look->overlay));
		json_object_object_add(rates, "hits", rounded(look->hits));
		json_object_object_add(rates, "misses", rounded(look->misses));
		json_object_object_add(rates, "base_reads", rounded(look->base));
	}
	json_object_object_add(object, "per_second", rates);
	json_object_object_add(object, "full_in", left < 0 ? NULL : rounded(left));
	return object;
}

static void print_look(const struct top *top, const struct look *const *sorted)
{
	struct json_object *object = json_object_new_object(), *list = json_object_new_array();

	for (size_t i = 0; i < top->nr; i++)
		json_object_array_add(list, describe_look(sorted[i]));
	json_object_object_add(object, "time",
			       json_object_new_int64(top->when.tv_sec * INT64_C(1000) +
						     top->when.tv_nsec / 1000000));
	json_object_object_add(object, "devices", list);
	puts(json_object_to_json_string_ext(object, JSON_C_TO_STRING_PLAIN |
					    JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(object);
}

static int show(struct top *top)
{
	const struct look **sorted = calloc(top->nr + 1, sizeof(*sorted));

	if (!sorted)
		return fail(-ENOMEM, "out of memory");
	for (size_t i = 0; i < top->nr; i++)
		sorted[i] = &top->looks[i];
	qsort(sorted, top->nr, sizeof(*sorted), top->order);
	if (top->args->json)
		print_look(top, sorted);
	else if (top->screen)
		draw_screen(top, sorted);
	else
		add_lines(top, sorted);
	free(sorted);
	return fflush(stdout) ? fail(io_error(errno), "cannot write the output: %m") : 0;
}

/*
 * From look to look
 */

static int parse(const struct args *args, struct top *top)
{
	static const struct {
		const char *name;
		int (*order)(const void *a, const void *b);
	} orders[] = { { "used", by_used }, { "rate", by_rate }, { "name", by_name } };
	const char *sort = args->value[KEY_SORT] ?: "used";

	top->args = args;
	top->delay_ms = 1000;
	for (size_t i = 0; i < sizeof(orders) / sizeof(orders[0]); i++)
		if (!strcmp(sort, orders[i].name))
			top->order = orders[i].order;
	if (!top->order)
		return fail(-EINVAL, "sort=%s is neither used, rate nor name", sort);
	return parse_time(args, KEY_DELAY, 100, &top->delay_ms) ?:
	       parse_number(args, KEY_LOOKS, &top->count);
}

/* Return: whether to end, by a signal or a key; any other key is to look at once. */
static bool pause_or_end(int64_t until, int signals, int keys)
{
	struct pollfd fds[] = {
		{ .fd = signals, .events = POLLIN },
		{ .fd = keys, .events = POLLIN },
	};
	int64_t left = until - now_ms();
	char typed[64];
	ssize_t n;

	if (poll(fds, 2, left > 0 ? left : 0) <= 0)
		return false;
	if (fds[0].revents)
		return true;
	n = read(keys, typed, sizeof(typed));
	return n <= 0 || memchr(typed, 'q', n) || memchr(typed, 'Q', n);
}

static int look_and_look(struct top *top, int keys)
{
	int signals = open_stop_signals(), err = 0;
	int64_t next = now_ms();

	for (uint64_t n = 0; !err && (!top->count || n < top->count); n++) {
		if (n && pause_or_end(next, signals, keys))
			break;
		/* not in a hurry after looks that took longer, and from now on after a key */
		if (next > now_ms() || next < now_ms() - 100)
			next = now_ms();
		next += top->delay_ms;
		err = take_look(top) ?: show(top);
	}
	close(signals);
	return err;
}

/* Keys come at once and are not shown. */
static bool take_keys(struct termios *before)
{
	struct termios raw;

	if (!isatty(STDIN_FILENO) || tcgetattr(STDIN_FILENO, before))
		return false;
	raw = *before;
	raw.c_lflag &= ~(ICANON | ECHO);
	/* These would leave the terminal like this. */
	raw.c_cc[VSUSP] = _POSIX_VDISABLE;
	raw.c_cc[VQUIT] = _POSIX_VDISABLE;
	return !tcsetattr(STDIN_FILENO, TCSANOW, &raw);
}

int cmd_top(const struct args *args)
{
	const char *term = getenv("TERM");
	struct termios before;
	struct top top = { 0 };
	bool keys = false;
	sigset_t set;
	int err = parse(args, &top);

	if (err)
		return err;
	stop_signals(&set);
	sigprocmask(SIG_BLOCK, &set, NULL);
	/* for the width of names, which are UTF-8 wherever they are shown */
	setlocale(LC_CTYPE, "C.UTF-8");
	top.screen = !args->json && isatty(STDOUT_FILENO) && term && strcmp(term, "dumb");
	top.colour = top.screen && terminal_takes_colour();
	if (top.screen) {
		keys = take_keys(&before);
		/* an empty screen without a cursor */
		fputs("\033[2J\033[?25l", stdout);
	}
	err = look_and_look(&top, keys ? STDIN_FILENO : -1);
	if (top.screen)
		fputs("\033[?25h", stdout);
	fflush(stdout);
	if (keys)
		tcsetattr(STDIN_FILENO, TCSANOW, &before);
	forget(&top.looks, &top.nr);
	forget(&top.before, &top.nr_before);
	return err;
}
