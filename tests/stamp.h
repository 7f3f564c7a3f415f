/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the test programs write: every 512-byte sector says which sector it is
 * and which write it came from, in each of its 64 words, so that a sector that
 * is old, misplaced or torn is recognised as such.
 *
 * A tag names the write. Tag 0 is a sector of zeroes, tag 1 is the content of
 * every base. Tags have 24 bits, sector numbers 40.
 */
#ifndef STAMP_H
#define STAMP_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define SECTOR 512
#define SECTORS_PER_BLOCK 8
#define STAMP_WORDS (SECTOR / sizeof(uint64_t))
#define STAMP_TAGS (1U << 24)
#define STAMP_UNKNOWN UINT32_MAX

enum { TAG_ZERO, TAG_BASE, TAG_FIRST };

static inline uint64_t stamp_word(uint64_t first, unsigned int i)
{
	return i ? (first + i) * 0x9e3779b97f4a7c15ULL : first;
}

static inline void stamp(void *buf, uint64_t sector, uint32_t tag)
{
	uint64_t *words = buf, first = (uint64_t)tag << 40 | sector;
	unsigned int i;

	if (tag == TAG_ZERO) {
		memset(buf, 0, SECTOR);
		return;
	}
	for (i = 0; i < STAMP_WORDS; i++)
		words[i] = stamp_word(first, i);
}

static inline void stamp_range(void *buf, uint64_t sector, uint64_t count, uint32_t tag)
{
	uint64_t i;

	for (i = 0; i < count; i++)
		stamp((char *)buf + i * SECTOR, sector + i, tag);
}

/* The tag of a sector found at @sector, or STAMP_UNKNOWN if no write made it. */
static inline uint32_t stamp_tag(const void *buf, uint64_t sector)
{
	const uint64_t *words = buf;
	uint64_t first = words[0];
	unsigned int i;

	if (!first) {
		for (i = 1; i < STAMP_WORDS; i++)
			if (words[i])
				return STAMP_UNKNOWN;
		return TAG_ZERO;
	}
	if ((first & ((1ULL << 40) - 1)) != sector || !(first >> 40))
		return STAMP_UNKNOWN;
	for (i = 1; i < STAMP_WORDS; i++)
		if (words[i] != stamp_word(first, i))
			return STAMP_UNKNOWN;
	return first >> 40;
}

/* Says what the sector holds; for one that is torn, what each part of it is. */
static inline void stamp_print(FILE *out, const void *buf, uint64_t sector)
{
	const uint64_t *words = buf;
	uint32_t tag = stamp_tag(buf, sector);
	unsigned int i;

	if (tag != STAMP_UNKNOWN) {
		fprintf(out, "tag %u", tag);
		return;
	}
	tag = stamp_tag(buf, words[0] & ((1ULL << 40) - 1));
	if (tag != STAMP_UNKNOWN && tag) {
		fprintf(out, "sector %llu with tag %u",
			(unsigned long long)(words[0] & ((1ULL << 40) - 1)), tag);
		return;
	}
	fprintf(out, "torn or foreign data:");
	for (i = 0; i < STAMP_WORDS; i += 8)
		fprintf(out, " %016llx", (unsigned long long)words[i]);
}

#endif
