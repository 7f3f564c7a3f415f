// SPDX-License-Identifier: GPL-2.0-only
/*
 * fuzz_model - what each read may see
 *
 * For each sector there is a list of the writes that may have been the last
 * one; zeroing, a discard and a reset count as writes. A write is in the list
 * from its start. When it ends well, those that had ended before it began are
 * gone: it has overwritten them. A write that fails may have been done for
 * some blocks, except that one of a single block changes nothing.
 *
 * A read may see any write that was in the list at some time during the read.
 * Having seen one, it rules out the others that had ended before the read
 * began. A sector that was being written during the read may be torn: then
 * each of its words must come from one of these writes.
 */
#include <unistd.h>

#include "fuzz.h"

#define WRITES 64		/* writes in a sector's list */
#define ACTIVE (THREADS * (RING + 2))
#define HISTORY 16384		/* operations to tell about when one fails */

/*
 * Where the base begins; where a leaf of the map ends (64 MiB), with the ends of
 * the base and of the smallest device in it; and where only growth leads to.
 */
const struct window windows[WINDOWS] = {
	{ 0, MIB(1), 0 },
	{ MIB(64) - KIB(256), MIB(1), MIB(1) },
	{ MIB(128) - KIB(128), KIB(256), MIB(2) },
	{ MIB(2), KIB(512), MODEL },
};

/* A write that may have been the last one of its sector. */
struct write {
	uint64_t start, end;	/* end is UINT64_MAX until it ends */
	uint64_t gone;		/* when it was overwritten, or UINT64_MAX */
	uint32_t tag;
};

static struct sector {
	unsigned int n;
	struct write writes[WRITES];
} *model;
static bool touched[MODEL / SECTORS_PER_BLOCK];	/* written to in this round */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for all of this */
static uint64_t now;		/* the clock: counts starts and ends */
static uint64_t active[ACTIVE];	/* starts of the operations under way, or 0 */
static struct op history[HISTORY];
static unsigned int nr_history;
uint64_t limited_until;
uint64_t total_ops;
uint64_t nowait_ops, nowait_again; /* with RWF_NOWAIT; of them ended with EAGAIN */
uint64_t wrong_sector;		/* by a read, or UINT64_MAX */
int wrong_view;			/* in which view, or -1 */

/*
 * Telling
 */

const char *const kind_names[] = {
	"check", "write", "discard", "zeroout", "punch", "zerorange", "flush", "look",
	"reset", "limit", "suspend", "reload", "clear-all", "cache", "view", "unview",
};

/* Messages about the cache of the base, none of which changes what can be read. */
const char *const cache_messages[CACHE_MESSAGES] = {
	"cow_on_read on", "cow_on_read off", "cow_on_cache on", "cache_limit 50",
	"cache_limit 400", "cache_limit none", "drop_cache", "prefetch 0 500",
	"prefetch 16300 200 2000", "prefetch stop", "queue_errors on", "queue_errors off",
};

void print_op(const struct op *op)
{
	printf("%s", kind_names[op->kind]);
	switch (op->kind) {
	case FLUSH:
	case RESET:
	case SUSPEND:
	case CLEAR_ALL:
		break;
	case LIMIT:
		printf(" %s%ld", op->total ? "of all " : "", op->limit);
		break;
	case CACHE:
		printf(" %s", cache_messages[op->message]);
		break;
	case UNVIEW:
		printf(" %u", op->view);
		break;
	case VIEW:
		printf(" %u: base %u, %" PRIu64 "s%s", op->view, op->base, op->sectors,
		       op->suspended ? ", suspended" : "");
		break;
	case LOOK:
		printf(" %u: %" PRIu64 "s %" PRIu64 "s", op->view, op->sector, op->count);
		break;
	case RELOAD:
		printf(" base %u, limit %ld, %" PRIu64 "s%s", op->base, op->limit, op->sectors,
		       op->abandon ? ", cleared" : "");
		break;
	default:
		printf(" %" PRIu64 "s %" PRIu64 "s", op->sector, op->count);
		if (op->kind == WRITE)
			printf(" tag %u", op->tag);
		if (op->flags)
			printf(" (%s%s%s%s )", op->flags & URING ? " io_uring" : "",
			       op->flags & NOWAIT ? " nowait" : "",
			       op->flags & VECTOR ? " vector" : "",
			       op->flags & DSYNC ? " dsync" : "");
	}
}

/*
 * The lists. All of it is called with the lock held.
 */

uint32_t initial_tag(uint64_t sector)
{
	return sector < base_sectors ? TAG_BASE : TAG_ZERO;
}

static struct sector *model_of(uint64_t sector)
{
	unsigned int i;

	for (i = 0; i < BUFFERED; i++)
		if (sector - windows[i].first < windows[i].sectors)
			return &model[windows[i].index + sector - windows[i].first];
	return NULL;
}

void model_reset(void)
{
	unsigned int i;
	uint64_t s;

	memset(touched, 0, sizeof(touched));
	memset(active, 0, sizeof(active));
	nr_history = 0;
	wrong_sector = UINT64_MAX;
	wrong_view = -1;
	for (i = 0; i < BUFFERED; i++) {
		for (s = 0; s < windows[i].sectors; s++) {
			struct sector *sector = &model[windows[i].index + s];

			sector->n = 1;
			sector->writes[0] = (struct write){
				.gone = UINT64_MAX, .tag = initial_tag(windows[i].first + s),
			};
		}
	}
}

static uint64_t oldest_active(void)
{
	uint64_t oldest = UINT64_MAX;
	unsigned int i;

	for (i = 0; i < ACTIVE; i++)
		if (active[i] && active[i] < oldest)
			oldest = active[i];
	return oldest;
}

/* Forgets what nobody who is under way can have seen. */
static void forget(struct sector *sector, uint64_t oldest)
{
	unsigned int i, n = 0;

	for (i = 0; i < sector->n; i++)
		if (sector->writes[i].gone >= oldest)
			sector->writes[n++] = sector->writes[i];
	sector->n = n;
}

/* What of the range the operation changes. Returns: false for nothing. */
static bool changed_range(const struct op *op, uint64_t *first, uint64_t *last)
{
	*first = op->sector;
	*last = op->sector + op->count;
	switch (op->kind) {
	case WRITE:
	case ZEROOUT:
	case PUNCH:
	case ZERORANGE:
		break;
	case DISCARD:
		*first = (*first + SECTORS_PER_BLOCK - 1) / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
		if (!op->tail)
			*last = *last / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
		break;
	default:
		return false;
	}
	return *first < *last;
}

static void sector_begin(struct sector *sector, const struct op *op, uint32_t tag)
{
	sector->writes[sector->n++] = (struct write){
		.start = op->start, .end = UINT64_MAX, .gone = UINT64_MAX, .tag = tag,
	};
}

/* Every window but the one for buffered I/O. */
bool whole_device(const struct op *op)
{
	return op->kind == RESET || op->kind == CLEAR_ALL;
}

static bool room_for(const struct op *op, uint64_t oldest)
{
	uint64_t first, last, s;
	struct sector *sector;

	if (whole_device(op)) {
		first = 0;
		last = MODEL;
		sector = model;
	} else if (changed_range(op, &first, &last)) {
		sector = model_of(first);
	} else {
		return true;
	}
	for (s = first; s < last; s++, sector++) {
		if (sector->n > WRITES / 2)
			forget(sector, oldest);
		if (sector->n == WRITES)
			return false;
	}
	return true;
}

void op_begin(struct op *op)
{
	uint64_t first, last, s;
	unsigned int i, w;

	pthread_mutex_lock(&lock);
	op->tail = true;	/* perhaps, so that there is room */
	while (!room_for(op, oldest_active())) {
		pthread_mutex_unlock(&lock);
		/* it may be one of our own that is in the way */
		reap_own();
		/* not only a yield: who is waited for needs the lock, too */
		usleep(1000);
		pthread_mutex_lock(&lock);
	}
	op->start = ++now;
	op->end = 0;
	op->tail = op->sector + op->count == cfg.sectors;
	for (i = 0; i < ACTIVE && active[i]; i++)
		;
	if (i == ACTIVE)
		die("too many operations under way");
	op->slot = i;
	active[i] = op->start;
	op->number = nr_history++;
	history[op->number % HISTORY] = *op;

	if (whole_device(op)) {
		for (w = 0; w < BUFFERED; w++)
			for (s = 0; s < windows[w].sectors; s++)
				sector_begin(&model[windows[w].index + s], op,
					     op->kind == RESET ?
					     initial_tag(windows[w].first + s) : TAG_ZERO);
	} else if (changed_range(op, &first, &last)) {
		struct sector *sector = model_of(first);

		for (s = first; s < last; s++, sector++) {
			sector_begin(sector, op, op->kind == WRITE ? op->tag : TAG_ZERO);
			touched[(sector - model) / SECTORS_PER_BLOCK] = true;
		}
	}
	pthread_mutex_unlock(&lock);
}

static void sector_end(struct sector *sector, const struct op *op, enum outcome outcome)
{
	unsigned int i, own = sector->n;

	for (i = 0; i < sector->n; i++) {
		struct write *write = &sector->writes[i];

		if (write->start == op->start)
			own = i;
		else if (outcome == DONE && write->end < op->start && write->gone > now)
			write->gone = now;
	}
	if (outcome == NOT_DONE)
		sector->writes[own] = sector->writes[--sector->n];
	else
		sector->writes[own].end = now;
}

/* What was done to the sector's block, and to all of the device. */
void print_history(uint64_t sector)
{
	uint64_t block = sector / SECTORS_PER_BLOCK;
	unsigned int i;

	printf("# operations on this block, with their start and end, before %" PRIu64 ":\n",
	       now);
	for (i = nr_history < HISTORY ? 0 : nr_history - HISTORY; i < nr_history; i++) {
		const struct op *old = &history[i % HISTORY];

		if (old->kind < RESET && (old->sector / SECTORS_PER_BLOCK > block ||
		    (old->sector + old->count - 1) / SECTORS_PER_BLOCK < block))
			continue;
		if (old->kind == FLUSH)
			continue;
		printf("#   %" PRIu64 "-%" PRIu64 " thread %u: ", old->start, old->end,
		       old->thread);
		print_op(old);
		if (old->result < 0)
			printf(": %s", strerror(-old->result));
		printf("\n");
	}
}

static void print_sector(const struct sector *sector, const struct op *op, const char *buf,
			 uint64_t number)
{
	unsigned int i;

	printf("# round %u, thread %u: ", cfg.number, op->thread);
	print_op(op);
	printf("\n# sector %" PRIu64 " (block %" PRIu64 ") may have", number,
	       number / SECTORS_PER_BLOCK);
	for (i = 0; i < sector->n; i++)
		if (sector->writes[i].gone > op->start)
			printf(" tag %u%s", sector->writes[i].tag,
			       sector->writes[i].end > op->start ? "*" : "");
	printf(" (*: written meanwhile)\n# but has ");
	stamp_print(stdout, buf, number);
	printf("\n");
	print_history(number);
}

/* Is each word of the sector from a write that the read may have seen? */
static bool torn_but_right(const struct sector *sector, const struct op *op, const char *buf,
			   uint64_t number)
{
	bool written_meanwhile = false;
	uint64_t content[STAMP_WORDS];
	uint64_t found = 0;
	unsigned int i, w;

	for (i = 0; i < sector->n; i++) {
		const struct write *write = &sector->writes[i];

		if (write->gone <= op->start)
			continue;
		written_meanwhile |= write->end > op->start;
		stamp(content, number, write->tag);
		for (w = 0; w < STAMP_WORDS; w++)
			if (!memcmp(&content[w], buf + w * sizeof(uint64_t), sizeof(uint64_t)))
				found |= 1ULL << w;
	}
	return written_meanwhile && found == UINT64_MAX;
}

/* Returns: whether the sector is right. */
static bool sector_read(struct sector *sector, const struct op *op, const char *buf,
			uint64_t number)
{
	uint32_t tag = stamp_tag(buf, number);
	bool allowed = false;
	unsigned int i;

	if (tag == STAMP_UNKNOWN)
		return torn_but_right(sector, op, buf, number);
	for (i = 0; i < sector->n; i++)
		allowed |= sector->writes[i].gone > op->start && sector->writes[i].tag == tag;
	if (!allowed)
		return torn_but_right(sector, op, buf, number);
	for (i = 0; i < sector->n; i++) {
		struct write *write = &sector->writes[i];

		if (write->tag != tag && write->end < op->start && write->gone > now)
			write->gone = now;
	}
	return true;
}

/* Returns: whether all was right; else it has been told, unless quiet. */
bool op_end(struct op *op, int result, enum outcome outcome)
{
	uint64_t first, last, s;
	struct sector *sector;
	bool right = true;

	pthread_mutex_lock(&lock);
	op->result = result;
	op->end = ++now;
	total_ops++;
	nowait_ops += !!(op->flags & NOWAIT);
	nowait_again += op->flags & NOWAIT && result == -EAGAIN;
	if (history[op->number % HISTORY].start == op->start)
		history[op->number % HISTORY] = *op;
	if (whole_device(op)) {
		for (s = 0; s < MODEL; s++)
			sector_end(&model[s], op, outcome);
	} else if (op->kind == READ) {
		sector = model_of(op->sector);
		for (s = 0; result > 0 && s < (uint64_t)result / SECTOR; s++) {
			right = sector_read(&sector[s], op, op->buffer + s * SECTOR,
					    op->sector + s);
			if (!right)
				break;
		}
		if (!right)
			wrong_sector = op->sector + s;
		if (!right && news()) {
			flockfile(stdout);
			print_sector(&sector[s], op, op->buffer + s * SECTOR, op->sector + s);
			funlockfile(stdout);
		}
	} else if (changed_range(op, &first, &last)) {
		/* the device may have grown meanwhile: then its last block was no whole one */
		uint64_t sure = op->kind == DISCARD ? last / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK :
				last;

		sector = model_of(first);
		for (s = first; s < last; s++, sector++)
			sector_end(sector, op, s < sure || outcome != DONE ? outcome : MAYBE);
	}
	active[op->slot] = 0;
	pthread_mutex_unlock(&lock);
	return right;
}

void model_init(void)
{
	model = calloc(MODEL, sizeof(*model));
	if (!model)
		die("out of memory");
}

void model_lock(void)
{
	pthread_mutex_lock(&lock);
}

void model_unlock(void)
{
	pthread_mutex_unlock(&lock);
}

/* Under the lock. Returns: a time that only what begins from now on comes after. */
uint64_t model_tick(void)
{
	return ++now;
}

/* Nothing is under way. Returns: what the sector has, or STAMP_UNKNOWN if that is not sure. */
uint32_t model_tag(uint64_t sector)
{
	const struct sector *s = model_of(sector);
	uint32_t tag = STAMP_UNKNOWN;
	unsigned int i, found = 0;

	for (i = 0; i < s->n; i++) {
		if (s->writes[i].gone == UINT64_MAX) {
			tag = s->writes[i].tag;
			found++;
		}
	}
	return found == 1 ? tag : STAMP_UNKNOWN;
}

/*
 * What a read from @start to @end, which are not long ago, may see of a sector; in @to if
 * that is not NULL. Locked.
 */
unsigned int model_possible(unsigned int index, uint64_t start, uint64_t end,
			    struct possible *to)
{
	const struct sector *sector = &model[index];
	unsigned int i, n = 0;

	for (i = 0; i < sector->n; i++) {
		const struct write *write = &sector->writes[i];

		if (write->gone <= start || write->start >= end)
			continue;
		if (to)
			to[n] = (struct possible){ write->start, write->gone, write->tag };
		n++;
	}
	return n;
}

/* How many blocks are stored: those with data of a write, or at most those written to. */
void model_count(unsigned int *least, unsigned int *most)
{
	unsigned int b, s, i;

	*least = *most = 0;
	for (b = 0; b < MODEL / SECTORS_PER_BLOCK; b++) {
		bool data = false;

		for (s = 0; s < SECTORS_PER_BLOCK; s++) {
			const struct sector *sector = &model[b * SECTORS_PER_BLOCK + s];

			for (i = 0; i < sector->n; i++)
				data |= sector->writes[i].gone == UINT64_MAX &&
					sector->writes[i].tag >= TAG_FIRST;
		}
		*least += data;
		*most += touched[b];
	}
}

void print_under_way(void)
{
	unsigned int i;

	for (i = nr_history < HISTORY ? 0 : nr_history - HISTORY; i < nr_history; i++) {
		if (history[i % HISTORY].end)
			continue;
		printf("# under way: thread %u: ", history[i % HISTORY].thread);
		print_op(&history[i % HISTORY]);
		printf("\n");
	}
}
