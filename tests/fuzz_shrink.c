// SPDX-License-Identifier: GPL-2.0-only
/*
 * fuzz_shrink - makes failures simpler
 *
 * With one thread a seed gives the same run each time. A stream that fails is
 * shortened as long as it goes on failing, and printed as commands of tests/io.
 *
 * With several threads a seed gives the same rounds: which operations each
 * thread does, in its order. How they meet is up to the scheduler, and failures
 * depend on that; so --repeat plays the round of the seed over and over. What
 * is told about a failure is all that was done to the block, with times; and
 * the round is simplified by leaving kinds of operations, threads and operations
 * away as long as it fails again within a few repetitions.
 */
#include "fuzz.h"

#define REPEAT 10		/* times that a simpler round gets to fail */
#define SHRINK 60		/* seconds for making a failure simpler */
#define SINGLE_OPS 400		/* operations of a round with one thread */

/* Whether the round fails again as the options are now. */
static bool fails_again(void)
{
	struct rng rng;
	unsigned int i;

	for (i = 0; i < REPEAT && time(NULL) < deadline; i++) {
		end_round();
		start_round(cfg.seed, &rng);
		if (!threads_round(&rng))
			return true;
	}
	return false;
}

/* Leaves away what the failure does not need, as far as a few repetitions tell. */
void simplify(void)
{
	time_t end = time(NULL) + SHRINK;
	unsigned int i, old;

	deadline = end + SHRINK;
	quiet = true;
	if (!fails_again()) {
		printf("# it does not fail again soon\n");
		return;
	}
	for (i = 0; i < FEATURES && time(NULL) < end; i++) {
		old = opt.without;
		opt.without |= 1U << i;
		if (opt.without != old && !fails_again())
			opt.without = old;
	}
	while (opt.threads > 2 && time(NULL) < end) {
		opt.threads--;
		if (!fails_again()) {
			opt.threads++;
			break;
		}
	}
	while (cfg.ops > 10 && time(NULL) < end) {
		old = opt.ops;
		opt.ops = cfg.ops / 2;
		if (!fails_again()) {
			opt.ops = old;
			break;
		}
	}
	printf("# the simplest that fails again:\n");
	quiet = false;
	fails_again();
}

/*
 * One thread
 */

/* Notes in the operations how they ended. */
static bool play(struct op *ops, unsigned int n, struct rng *rng)
{
	unsigned int i;

	for (i = 0; i < n && !broken; i++) {
		struct op op = ops[i];

		if (op.kind >= RESET)
			run_control(&op, rng);
		else if (op.sector + op.count <= cfg.sectors)
			run_sync(&op, rng);
		ops[i].result = op.result;
	}
	return !broken && verify(rng);
}

/* From a fresh device; what chance decides is the same each time. */
static bool play_again(struct op *ops, unsigned int n)
{
	struct rng rng;

	end_round();
	start_round(cfg.seed, &rng);
	return play(ops, n, &rng);
}

/* The tag of tests/io for one of ours: each write has a letter. */
static char letter(const struct op *ops, unsigned int n, uint32_t tag)
{
	static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
	unsigned int i, nth = 0;

	for (i = 0; i < n; i++) {
		if (ops[i].kind == WRITE && ops[i].tag == tag)
			return letters[nth % (sizeof(letters) - 1)];
		nth += ops[i].kind == WRITE;
	}
	return tag == TAG_BASE ? '.' : tag == TAG_ZERO ? '0' : '?';
}

/* @sectors: size of the device; @views: a bit for each that there is */
static void print_control(const struct op *op, uint64_t *sectors, unsigned int *views)
{
	char params[512];

	if (op->kind == RELOAD && op->result == -EBUSY)
		return;
	if (op->suspended || op->kind == SUSPEND)
		printf(" 'suspend " NAME "'");
	switch (op->kind) {
	case RESET:
		printf(" 'message " NAME " reset'");
		break;
	case LIMIT:
		if (op->total)
			printf(" && echo %ldK >" TOTAL_LIMIT " &&\\\n    io /dev/mapper/" NAME,
			       op->limit ? op->limit * 4 : 1L << 40);
		else if (op->limit)
			printf(" 'message " NAME " limit %ld'", op->limit);
		else
			printf(" 'message " NAME " limit none'");
		break;
	case RELOAD:
		table_params(params, sizeof(params), op->base, op->limit);
		if (op->sectors > *sectors && !op->abandon)
			*sectors = op->sectors;
		printf(" 'load " NAME " %" PRIu64 " nbdcow %s'",
		       op->abandon ? op->sectors : *sectors, params);
		printf(op->abandon ? " 'run dmsetup clear " NAME "'" : " 'resume " NAME "'");
		return;
	case CLEAR_ALL:
		printf(" 'discard 0 %" PRIu64 "s'", *sectors);
		break;
	case CACHE:
		printf(" 'message " NAME " %s'", cache_messages[op->message]);
		break;
	case VIEW:
		snprintf(params, sizeof(params), "/dev/mapper/" NAME " %s", opt.bases[op->base]);
		printf(" '%s " NAME "-view%u %" PRIu64 " nbdcow-view %s'",
		       *views & 1U << op->view ? "reload" : "create", op->view,
		       op->sectors < *sectors ? op->sectors : *sectors, params);
		*views |= 1U << op->view;
		break;
	case UNVIEW:
		if (*views & 1U << op->view)
			printf(" 'remove " NAME "-view%u'", op->view);
		*views &= ~(1U << op->view);
		break;
	default:
		break;
	}
	if (op->suspended || op->kind == SUSPEND)
		printf(" 'resume " NAME "'");
}

/* What shows the failure: the block of the sector that was wrong, or the status. */
static void print_expected(const struct op *ops, unsigned int n)
{
	uint64_t at = wrong_sector / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
	unsigned int s;

	if (wrong_sector == UINT64_MAX) {
		printf(" && dmsetup status " NAME "\n");
		return;
	}
	if (wrong_view >= 0)
		printf(" 'open " NAME "-view%d'", wrong_view);
	printf(" 'is %" PRIu64 "s ", at);
	for (s = 0; s < SECTORS_PER_BLOCK && at + s < cfg.sectors; s++)
		putchar(letter(ops, n, wrong_view >= 0 ? view_tag(at + s) : model_tag(at + s)));
	printf("'\n");
}

/* @first: the round as it began */
static void print_stream(const struct op *ops, unsigned int n, const struct round *first)
{
	uint64_t sectors = first->sectors;
	unsigned int i, views = 0;
	char params[512];

	table_params(params, sizeof(params), first->base, first->limit);
	printf("# %u operations are enough:\n", n);
	for (i = 0; i < n; i++) {
		printf("#   ");
		print_op(&ops[i]);
		printf("\n");
	}
	printf("dmsetup create " NAME " --table '0 %" PRIu64 " nbdcow %s' &&\\\n"
	       "    io /dev/mapper/" NAME, sectors, params);
	for (i = 0; i < n; i++) {
		const struct op *op = &ops[i];

		if (op->kind >= RESET) {
			print_control(op, &sectors, &views);
			continue;
		}
		if (op->sector + op->count > sectors)
			continue;
		if (op->kind == LOOK) {
			if (views & 1U << op->view)
				printf(" 'open " NAME "-view%u' 'check %" PRIu64 "s %" PRIu64
				       "s ?' 'open -'", op->view, op->sector, op->count);
			continue;
		}
		printf(" '%s%s%s", op->result == -ENOSPC ? "fails ENOSPC " :
				   op->result == -EAGAIN ? "fails EAGAIN " : "",
		       op->flags & NOWAIT ? "nowait " : "",
		       op->flags & DSYNC ? "fua" : kind_names[op->kind]);
		if (op->kind != FLUSH)
			printf(" %" PRIu64 "s %" PRIu64 "s", op->sector, op->count);
		if (op->kind <= WRITE)
			printf(" %c", op->kind == READ ? '?' : letter(ops, n, op->tag));
		printf("'");
	}
	print_expected(ops, n);
}

/* Leaves operations away, in pieces of half the number each time. */
static unsigned int leave_away(struct op *ops, unsigned int n, time_t end)
{
	struct op *fewer = malloc(n * sizeof(*fewer));
	unsigned int piece = n / 2, at, rest;

	if (!fewer)
		die("out of memory");
	while (piece && time(NULL) < end) {
		bool shorter = false;

		for (at = 0; at < n && time(NULL) < end;) {
			rest = at + piece < n ? n - at - piece : 0;
			memcpy(fewer, ops, at * sizeof(*ops));
			memcpy(fewer + at, ops + n - rest, rest * sizeof(*ops));
			if (at + rest < n && !play_again(fewer, at + rest)) {
				n = at + rest;
				memcpy(ops, fewer, n * sizeof(*ops));
				shorter = true;
			} else {
				at += piece;
			}
		}
		if (!shorter || piece > 1)
			piece /= 2;
	}
	free(fewer);
	return n;
}

/* Makes single operations plainer and shorter. */
static void make_plain(struct op *ops, unsigned int n, time_t end)
{
	unsigned int i, kind;

	for (i = 0; i < n; i++) {
		for (kind = 0; kind < 3 && ops[i].kind < FLUSH && time(NULL) < end; kind++) {
			struct op old = ops[i];

			if (kind == 0 ? !old.flags && !old.shift : old.count == 1)
				continue;
			if (kind == 0)
				ops[i].flags = ops[i].shift = 0;
			else
				ops[i].count -= old.count / 2;
			if (kind == 2)
				ops[i].sector += old.count / 2;
			if (play_again(ops, n))
				ops[i] = old;
			else
				kind = 0;	/* the halves of the half */
		}
	}
}

bool single_round(struct rng *rng)
{
	static struct op ops[SINGLE_OPS];
	struct rng stream = { next_random(rng) };
	const struct round first = cfg;
	time_t end;
	unsigned int i, n;

	/* the operations must not depend on how far the device has grown */
	cfg.sectors = LARGEST;
	for (i = 0; i < SINGLE_OPS; i++)
		ops[i] = cfg.control && percent(&stream, 5) ? random_control(&stream, 0) :
							      random_op(&stream, 0);
	cfg.sectors = first.sectors;
	if (play(ops, SINGLE_OPS, rng))
		return true;
	end = time(NULL) + SHRINK;
	quiet = true;
	n = leave_away(ops, SINGLE_OPS, end);
	make_plain(ops, n, end);
	quiet = false;
	if (play_again(ops, n))
		printf("# the failure did not come again\n");
	print_stream(ops, n, &first);
	return false;
}
