/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A read would return what its base does not hold: what kernel/base.c does with one
 * block of the cache, for spin to try every interleaving of. Names are those of the
 * kernel code. tests/user/model.sh runs it.
 *
 * Clients read the block, or read it past the cache and add a copy, as a partial write
 * does. Each table of the device has a base, and `control' replaces the first table by
 * one on another base. `shrinker' drops cached pages whenever it may: eviction, a lower
 * limit, memory pressure and drop_cache are all that. A page that nobody holds may be
 * anybody's the next moment.
 *
 * What must hold:
 *  - A read returns what the base of its table holds, or fails because a read of the
 *    base failed that was made for it alone.
 *  - Never do two reads that fill the cache read the block at once. Unless something is
 *    dropped or fails, all readers together read the base once.
 *  - Nothing is used after it was freed, everybody comes to an end, and then the counter
 *    counts what is cached, and nothing else has a page or a base.
 *
 * As in overlay.pml each MUTANT takes one protection out, and memory is sequentially
 * consistent.
 */

/* In nbdcow_cache_find() */
#define NO_TRY_GET	 1	/* folio_try_get() of a page that is free */
#define NO_RECHECK	 2	/* is the page still where it was found? */
#define NO_READ_REF	 3	/* the reference while it is copied */
/* In nbdcow_cache_fetch(), fetch_join() and fetch_create() */
#define JOIN_UNLOCKED	 4	/* look at the entry and join in one */
#define STORE_FETCH	 5	/* xa_cmpxchg() */
#define NO_STALE	 6	/* whoever came too late looks again */
#define NO_FETCH_REF	 7	/* kref_get() of the base */
/* In fetch_publish() and fetch_end() */
#define ERROR_CACHED	 8	/* nothing is kept of a read that failed */
#define PUBLISH_EARLY	 9	/* pages come after the read */
#define BIOS_EARLY	 10	/* who waits is taken in one with that */
#define NO_COPY_REF	 11	/* get_page() */
#define FAIL_TOGETHER	 12	/* who waited reads for itself */
/* In nbdcow_cache_add(), evict() and base_get() */
#define STORE_PAGE	 13	/* xa_cmpxchg() */
#define EVICT_FETCH	 14	/* is_fetch() */
#define EVICT_UNLOCKED	 15	/* find and remove in one */
#define ONE_BASE	 16	/* by device */

#ifndef MUTANT
#define MUTANT	0
#endif
/* How many clients; may they add */
#ifndef CLIENTS
#define CLIENTS	2
#endif
#ifndef ADDERS
#define ADDERS	1
#endif
/* Does the base fail, memory, the shrinker do anything, another table come? */
#ifndef ERRORS
#define ERRORS	1
#endif
#ifndef FAIL
#define FAIL	1
#endif
#ifndef DROPS
#define DROPS	1
#endif
#ifndef TABLES
#define TABLES	2
#endif

#define BIT(n)	(1 << (n))
#define PAGES	(CLIENTS + 1)

/* Content: of the device that table n names, or what a page has before. */
#define CONTENT(n) (1 + (n))
#define GARBAGE	0

typedef Page {
	byte refs;
	byte content;
};
Page page[PAGES];

/* What the array has for the block: nothing, a fetch, a page */
#define FETCH	1
#define IS_FETCH(slot) (slot >= FETCH && slot < FETCH + CLIENTS)
#define PAGE	(FETCH + CLIENTS)

typedef Base {
	byte slot;
	byte cached;
	byte refs;		/* tables and fetches */
	byte fetches;		/* reads for the cache that are under way */
};
Base base[TABLES];

/* Each client makes one at a time; its number is the fetch's. */
typedef Fetch {
	bit submitted;
	byte base;
	byte table;		/* whose device is read */
	byte page;
	byte bios;		/* bit per client */
};
Fetch fetch[CLIENTS];

/* How the bio of a client ended, if another has it */
#define COPIED	1
#define ALONE	2		/* nbdcow_read_base() */
#define FAILED	3
byte done[CLIENTS];
byte copied[CLIENTS];

byte table;			/* the live one */
byte io[TABLES];		/* bios that a table has under way */
byte reads;			/* of the base */
byte running;

/* In d_steps */
inline page_alloc(p)
{
	p = 0;
	do
	:: page[p].refs -> p++
	:: else -> break
	od;
	page[p].refs = 1
}

inline put_page(p)
{
	assert(page[p].refs);
	page[p].refs--;
	if
	:: page[p].refs == 0 -> page[p].content = GARBAGE
	:: else
	fi
}

inline base_put(b)
{
	assert(base[b].refs);
	base[b].refs--;
	if
	:: base[b].refs == 0 ->
		/* base_release() */
		assert(!IS_FETCH(base[b].slot));
		if
		:: base[b].slot >= PAGE ->
			put_page(base[b].slot - PAGE);
			base[b].cached--
		:: else
		fi;
		base[b].slot = 0;
		assert(base[b].cached == 0)
	:: else
	fi
}

/* A step that uses the base, which must still be there. */
#define USES(b)	assert(base[b].refs)

proctype client(byte me; bit adds)
{
	byte t, b, slot, p, got;
	bit failed;

	/* map(): the table stays as long as the bio */
	d_step {
		t = table;
#if MUTANT != ONE_BASE
		b = table;
#endif
		io[t]++
	}
find:
	atomic { USES(b); slot = base[b].slot }
	if
	:: slot >= PAGE
	:: else -> goto miss
	fi;
	p = slot - PAGE;
#if MUTANT != NO_READ_REF
	/* folio_try_get() */
	if
#if MUTANT == NO_TRY_GET
	:: d_step { assert(page[p].refs); page[p].refs++ }
#else
	:: d_step { page[p].refs -> page[p].refs++ }
	:: page[p].refs == 0 -> goto find
#endif
	fi;
#if MUTANT != NO_RECHECK
	if
	:: base[b].slot == slot
	:: else -> d_step { put_page(p) } goto find
	fi;
#endif
#endif
	d_step {
		USES(b);
		got = page[p].content;
#if MUTANT != NO_READ_REF
		put_page(p)
#endif
	}
	goto check;

miss:
	if
	:: adds -> goto alone
	:: else
	fi;
	/* nbdcow_cache_fetch() */
	d_step { USES(b); slot = base[b].slot }
	if
	:: slot >= PAGE -> goto find
	:: IS_FETCH(slot) ->
		/* fetch_join() */
		if
		:: atomic {
#if MUTANT != JOIN_UNLOCKED
			base[b].slot == slot ->
#endif
			assert(base[b].slot == slot);
			fetch[slot - FETCH].bios = fetch[slot - FETCH].bios | BIT(me)
		   }
			goto wait
#if MUTANT != JOIN_UNLOCKED
		:: base[b].slot != slot -> goto find
#endif
		fi
	:: slot == 0
	fi;
	/* fetch_create() */
	if
#if FAIL
	:: goto alone
#endif
	:: d_step { base[b].cached++; page_alloc(p) }
	fi;
	d_step {
		slot = base[b].slot;
#if MUTANT == STORE_FETCH
		slot = 0;
#endif
		if
		:: slot == 0 ->
			base[b].slot = FETCH + me;
			fetch[me].base = b;
			fetch[me].table = t;
			fetch[me].page = p;
#if MUTANT != NO_FETCH_REF
			base[b].refs++;
#endif
			base[b].fetches++;
			assert(base[b].fetches == 1)
		:: else ->
			put_page(p);
			base[b].cached--
		fi
	}
	if
	:: slot ->
#if MUTANT != NO_STALE
		if
		:: base[b].slot -> goto find
		:: else
		fi;
#endif
		goto alone
	:: else
	fi;
	/* what others added to it meanwhile stays */
	d_step { fetch[me].bios = fetch[me].bios | BIT(me) }
	fetch[me].submitted = 1;
wait:
	done[me];
	d_step {
		slot = done[me];
		got = copied[me];
		done[me] = 0;
		copied[me] = 0
	}
	if
	:: slot == COPIED -> goto check
	:: slot == FAILED -> assert(false)
	:: slot == ALONE
	fi;

alone:	/* nbdcow_read_base(), or rmw_read() */
	atomic { got = CONTENT(t); reads++ }
#if ERRORS
	if
	:: failed = 1
	:: true
	fi;
#endif
	if
	:: adds && !failed
	:: else -> goto check
	fi;
	/* nbdcow_cache_add() */
#if FAIL
	if
	:: goto check
	:: true
	fi;
#endif
	d_step {
		USES(b);
		base[b].cached++;
		page_alloc(p);
		page[p].content = got
	}
	d_step {
#if MUTANT != STORE_PAGE
		if
		:: base[b].slot == 0 -> base[b].slot = PAGE + p
		:: else ->
			put_page(p);
			base[b].cached--
		fi
#else
		base[b].slot = PAGE + p
#endif
	}
check:
	atomic {
		assert(failed || got == CONTENT(t));
		io[t]--;
		running--
	}
}

/* fetch_work(); the fetch's number is @f. */
proctype worker(byte f)
{
	byte p, b, bios, c;
	bit ok;

end:	do
	:: atomic {
		fetch[f].submitted ->
		p = fetch[f].page;
		b = fetch[f].base;
		reads++
	   }
#if MUTANT == PUBLISH_EARLY
		base[b].slot = PAGE + p;
#endif
		if
		:: d_step { true -> page[p].content = CONTENT(fetch[f].table); ok = 1 }
#if ERRORS
		:: ok = 0
#endif
		fi;
#if MUTANT == BIOS_EARLY
		d_step { bios = fetch[f].bios; fetch[f].bios = 0 }
#endif
		d_step {
			/* fetch_publish() */
			USES(b);
			assert(base[b].slot == FETCH + f || MUTANT == PUBLISH_EARLY);
#if MUTANT == ERROR_CACHED
			ok = 1;
#endif
			if
			:: ok ->
#if MUTANT != NO_COPY_REF
				page[p].refs++;
#endif
				base[b].slot = PAGE + p
			:: else -> base[b].slot = 0
			fi;
#if MUTANT == BIOS_EARLY
			assert(!fetch[f].bios);
#else
			bios = fetch[f].bios;
#endif
			fetch[f].bios = 0;
			fetch[f].submitted = 0;
			base[b].fetches--
		}
		do
		:: c < CLIENTS ->
			/* fetch_copy() */
			d_step {
				if
				:: bios & BIT(c) ->
					copied[c] = (ok -> page[p].content : 0);
#if MUTANT == FAIL_TOGETHER
					done[c] = (ok -> COPIED : FAILED)
#else
					done[c] = (ok -> COPIED : ALONE)
#endif
				:: else
				fi;
				c++
			}
		:: else -> break
		od;
		atomic {
			USES(b);
			if
			:: ok ->
#if MUTANT != NO_COPY_REF
				put_page(p)
#endif
			:: else ->
				put_page(p);
				base[b].cached--
			fi;
#if MUTANT != NO_FETCH_REF
			base_put(b);
#endif
			p = 0;
			b = 0;
			bios = 0;
			c = 0;
			ok = 0
		}
	od
}

#if DROPS
#if MUTANT == EVICT_FETCH
#define EVICTS(slot)	(slot)
#else
#define EVICTS(slot)	(slot >= PAGE)
#endif

/* evict() */
proctype shrinker()
{
	byte b, slot;

end:	do
	:: d_step {
		base[0].refs && EVICTS(base[0].slot) -> slot = base[0].slot
#if MUTANT != EVICT_UNLOCKED
		;
		base[0].slot = 0;
		base[0].cached--;
		if
		:: IS_FETCH(slot)
		:: else -> put_page(slot - PAGE)
		fi;
		slot = 0
#endif
	   }
#if MUTANT == EVICT_UNLOCKED
		d_step {
			base[0].slot = 0;
			base[0].cached--;
			put_page(slot - PAGE);
			slot = 0
		}
#endif
	od
}
#endif

#if TABLES > 1
/* A table on another base; its resume waits for the bios of the first. */
proctype control()
{
	base[1].refs = 1;
	atomic {
		io[0] == 0 ->
		table = 1
	}
#if MUTANT != ONE_BASE
	d_step { base_put(0) }
#endif
}
#endif

init
{
	byte c, b, p, held;

	atomic {
		base[0].refs = 1;
		running = CLIENTS;
#if DROPS
		/* it may be cached at first */
		if
		:: page[0].refs = 1;
			page[0].content = CONTENT(0);
			base[0].slot = PAGE;
			base[0].cached = 1
		:: true
		fi;
#endif
#if DROPS
		run shrinker();
#endif
#if TABLES > 1
		run control();
#endif
		do
		:: c < CLIENTS ->
			run worker(c);
			if
			:: run client(c, 0)
#if ADDERS
			:: run client(c, 1)
#endif
			fi;
			c++
		:: else -> break
		od
	}
	/* all is quiet */
	d_step {
		running == 0 && table == TABLES - 1 && base[TABLES - 1].refs == 1 &&
		base[0].refs == (TABLES == 1 || MUTANT == ONE_BASE) ->
		do
		:: b < TABLES ->
			assert(!IS_FETCH(base[b].slot));
			assert(base[b].cached == (base[b].slot != 0));
			held = held + base[b].cached;
			if
			:: base[b].slot ->
				assert(page[base[b].slot - PAGE].refs == 1);
				assert(page[base[b].slot - PAGE].content == CONTENT(b))
			:: else
			fi;
			b++
		:: else -> break
		od;
		do
		:: p < PAGES -> held = held - page[p].refs; p++
		:: else -> break
		od;
		assert(held == 0);
#if !ERRORS && !FAIL && !DROPS && TABLES == 1 && !ADDERS
		assert(reads == 1);
#endif
		assert(true)
	}
}
