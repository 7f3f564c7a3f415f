/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A completed write would be lost, or a read return bytes that nobody wrote: what
 * kernel/overlay.c, map.c and store.c do with one block, for spin to try every
 * interleaving of. Names are those of the kernel code. tests/user/model.sh runs it.
 *
 * The block has two halves, so that a write can be partial. Clients do operations
 * of every kind, from every state that the block may have at first. `memory' swaps
 * pages out, drops clean ones and migrates them, whenever the kernel may; `layer_work'
 * frees what a reset replaced. Steps are merged only where nobody could look in
 * between, or where it makes the check stricter (an operation ends with its last step).
 *
 * A new page is not up to date before it is filled, or it is one that tmpfs has zeroed,
 * which is what a page that is larger than a block looks like, too: up to date, and
 * nothing of this block in it.
 *
 * What must hold:
 *  - Reads are linearizable, each half for itself: a read sees an operation that
 *    had begun, and that no other had overwritten for certain before the read
 *    began. What a read has seen rules out, for later reads, all that had ended
 *    before that read or before the operation that it saw began. The last read
 *    comes when all is quiet, and so finds writes that got lost.
 *  - Nothing is used after it was freed: pages, leaves, layers.
 *  - In the end the counters count the stored block once, only a stored block has a
 *    page, what was replaced is freed, and everybody has come to an end.
 *
 * Each MUTANT takes one protection out; spin must find what it is good for. Out of
 * reach is the order of memory accesses, which is sequentially consistent here: the
 * release of word_change() and the acquire of nbdcow_map_run(), the reference before
 * the look in store_find(). Those are left to the thread sanitizer (map.sh)
 * and to KCSAN. Nor is base.c in it: each partial write reads the base for itself.
 *
 * Some lines could go without a loss in this model, so they are no mutants.
 *  - set_page_dirty() in rewrite_found(), and folio_mark_dirty() in a rewrite: a locked
 *    page of the file is dirty since its install or since it came back from swap.
 *  - The check of the mapping in nbdcow_store_lock(), and the state before the punch in
 *    __zero_leaf(): the reference keeps the page, and what is written to it while it
 *    goes comes before the discard. The check of PageUptodate() there: the page was up
 *    to date when it was found, and stays so.
 *  - That a page of nbdcow_write_begin() is locked, and not up to date, before it is
 *    filled: whoever finds it earlier sees from the state that it is not the block's.
 *  - wait_for_dying() in nbdcow_overlay_reset(): it only keeps memory from piling up.
 */

/* In install_block(), fill_and_publish(), nbdcow_store_filled(), __overlay_write() */
#define NO_SECOND_LOOK	  1	/* who has read the base does not look for OVERLAY */
#define BASE_OVER_ZERO	  2	/* ... nor for ZERO: `state == NBDCOW_BASE' */
#define NO_INSTALLER_LOCK 3	/* mutex_lock(lock) */
#define NO_SLOW_LOCK	  4	/* nbdcow_store_lock() in nbdcow_store_get_locked() */
#define STATE_BEFORE_DATA 5	/* nbdcow_map_change() comes last */
#define DIRTY_LATE	  6	/* folio_mark_dirty() before unlock_page(), put_page() */
#define NO_SHARD_READ	  7	/* lock_shard_read() in nbdcow_overlay_write() */
#define NO_FILL		  8	/* nbdcow_fill_page() for zeroes: the page is not zeroed */
#define NO_UPTODATE	  9	/* folio_mark_uptodate() */
#define UPTODATE_LATE	  10	/* ... before unlock_page() */
/* In nbdcow_overlay_copy(), read_found(), rewrite_found() and usable_page() */
#define NO_REWRITE_LOCK	  11	/* nbdcow_store_lock() in rewrite_found() */
#define NO_LOOK		  12	/* the state once the page is there */
#define LOOK_BEFORE_FIND  13	/* only its order */
#define NO_UPTODATE_CHECK 14	/* folio_test_uptodate() */
#define NO_READ_REF	  15	/* the reference of a reader */
#define LAYER_TWICE	  16	/* page and state come from one layer */
#define NO_LAST_LOOK	  17	/* nbdcow_store_has() in read_found() */
/* In nbdcow_overlay_zero(), __zero_leaf() and nbdcow_map_zero_leaf() */
#define NO_SHARD_WRITE	  20	/* down_write(lock) */
#define PUNCH_UNLOCKED	  21	/* it lasts until the pages are gone */
#define NO_GRACE_LEAF	  23	/* call_rcu() */
/* In nbdcow_overlay_reset(), nbdcow_overlay_put() and overlay_grow() */
#define NO_SHARD_RESET	  30	/* lock_all_shards() in a reset */
#define NO_SHARD_GROW	  31	/* lock_all_shards() in growth */
#define NO_GRACE_RESET	  32	/* queue_rcu_work(): not just queue_work() */
#define NO_GRACE_GROW	  33	/* synchronize_rcu() in growth */
#define GRACE_UNLOCKED	  34	/* ... while the shards are locked */
#define NO_MUTEX	  35	/* ov->mutex */
#define NO_DYING	  36	/* wait_for_dying() in nbdcow_overlay_put() */

#ifndef MUTANT
#define MUTANT	0
#endif

/*
 * Configuration: how many operations the clients do, and which
 */
#ifndef OPS0
#define OPS0	1
#endif
#ifndef OPS1
#define OPS1	1
#endif
#ifndef OPS2
#define OPS2	1
#endif
#define OPS	(1 + OPS0 + OPS1 + OPS2)	/* the first is the block's content */

/* Kinds of operations, bits of what KINDS allows */
#define READ	0
#define WHOLE	1	/* write both halves */
#define HALF0	2	/* write one */
#define HALF1	3
#define DISCARD	4	/* or zeroing; of the whole leaf or of a part */
#define RESET	5
#define GROW	6
#ifndef KINDS
#define KINDS	127
#endif
/* The kinds of single operations, where given */
#define ANY	9
#ifndef KIND1
#define KIND1	ANY
#endif
#ifndef KIND2
#define KIND2	ANY
#endif
#ifndef KIND3
#define KIND3	ANY
#endif
#ifndef KIND4
#define KIND4	ANY
#endif
#ifndef KIND5
#define KIND5	ANY
#endif
#define WANTED(op) (op == 1 -> KIND1 : (op == 2 -> KIND2 : (op == 3 -> KIND3 : \
		   (op == 4 -> KIND4 : KIND5))))
/* Does an allocation fail, or a limit refuse? */
#ifndef FAIL
#define FAIL	0
#endif
/* Does `memory' do anything? */
#ifndef MEMORY
#define MEMORY	1
#endif

/* Is there another block in the same large page, for a while? */
#ifndef NEIGHBOUR
#define NEIGHBOUR 0
#endif

#ifndef LAYERS
#define LAYERS	3	/* the first, and one for each reset or growth */
#endif
#define LEAVES	4
#define PAGES	5

#define BIT(n)	(1 << (n))

/*
 * What operations may be seen to have done
 */

/* Content of half a block; a write stores WRITTEN + its number. */
#define BASE_BYTES	0
#define ZERO_BYTES	1
#define GARBAGE		2	/* of a page before it is filled */
#define WRITTEN		3

#define CONTENT(op) \
	(kind[op] == DISCARD -> ZERO_BYTES : (kind[op] == RESET -> BASE_BYTES : WRITTEN + op))
#define TOUCHES(op, half) \
	(kind[op] != READ && kind[op] != GROW && kind[op] != (half == 0 -> HALF1 : HALF0))

byte kind[OPS];
byte begun, ended;	/* bit per operation */
byte dead[2];		/* bit per operation that is overwritten for certain */
byte before[OPS];	/* bit per operation that had ended when this one began */
byte i, n, seen;	/* of single steps, 0 in between */

inline op_begin(op)
{
	before[op] = ended;
	begun = begun | BIT(op)
}

inline op_end(op)
{
	ended = ended | BIT(op);
	if
	:: TOUCHES(op, 0) -> dead[0] = dead[0] | before[op]
	:: else
	fi;
	if
	:: TOUCHES(op, 1) -> dead[1] = dead[1] | before[op]
	:: else
	fi
}

/* It has done nothing, and nobody may ever see it. */
inline op_fail(op)
{
	begun = begun & ~BIT(op);
	before[op] = 0
}

/*
 * In a d_step: a read saw `value'; when it began, the operations `gone' were
 * overwritten and those in `past' had ended.
 */
inline check_half(half, gone, past, value)
{
	i = 0;
	n = 0;
	do
	:: i < OPS ->
		if
		:: (begun & BIT(i)) && !(gone & BIT(i)) && TOUCHES(i, half) &&
		   CONTENT(i) == value -> n++; seen = i
		:: else
		fi;
		i++
	:: else -> break
	od;
	assert(n > 0);
	if
	:: n == 1 -> dead[half] = dead[half] | before[seen] | (past & ~BIT(seen))
	:: else
	fi;
	i = 0;
	n = 0;
	seen = 0
}

/*
 * RCU and locks
 */

byte rcu;			/* bit per client in a read section */

byte shard_readers;
bit shard_writer, installer, mutex;

/* States of the block, and what a slot of the map has instead of a leaf */
#define BASE	0
#define OVERLAY	1
#define ZERO	2
#define LEAF	3	/* LEAF + n: leaf n */

typedef Leaf {
	byte word;		/* the block's state */
	bit used;
	bit going;		/* freed, or will be when nobody is in: */
	byte readers;		/* bit per client */
};
Leaf leaf[LEAVES];

typedef Layer {
	byte slot;		/* BASE, ZERO, or LEAF + leaf */
	byte file;
	byte used;
	byte readers;		/* clients that its grace period waits for */
	bit queued;		/* for layer_work() */
	bit freed;
};
Layer layers[LAYERS];
byte nr_layers;
byte layer;			/* ov->layer */
byte dying;			/* ov->dying */
bit ov_gone;			/* it is freed */
byte total_used;

inline rcu_read_lock()
{
	rcu = rcu | BIT(me)
}

inline rcu_read_unlock()
{
	rcu = rcu & ~BIT(me);
	i = 0;
	do
	:: i < LEAVES -> leaf[i].readers = leaf[i].readers & ~BIT(me); i++
	:: else -> break
	od;
	i = 0;
	do
	:: i < LAYERS -> layers[i].readers = layers[i].readers & ~BIT(me); i++
	:: else -> break
	od;
	i = 0
}

/*
 * Pages. A file has one, of the block; what it holds while it is swapped out is in
 * `swap', and in a page of the swap cache as long as somebody has a reference.
 */

typedef Page {
	byte bytes[2];
	byte refs;		/* bit per client */
	byte owner;		/* 0, or 1 + file */
	byte swapcache;		/* 0, or 1 + file */
	bit uptodate;
	bit locked;
	bit dirty;
};
Page page[PAGES];

#define SWAP	255
typedef File {
	byte entry;		/* 0, 1 + page, or SWAP */
	byte swap[2];
};
File file[LAYERS];

#define HAS_PAGE(f)	(file[f].entry != 0 && file[f].entry != SWAP)
#define PAGE_OF(f)	(file[f].entry - 1)
#define LOCKED(f)	(HAS_PAGE(f) && page[PAGE_OF(f)].locked)

/* All that follows up to the map is for d_steps. A page that nobody needs is free. */
inline page_settle(p)
{
	if
	:: page[p].refs == 0 && page[p].owner == 0 ->
		if
		:: page[p].swapcache && page[p].dirty ->
			file[page[p].swapcache - 1].swap[0] = page[p].bytes[0];
			file[page[p].swapcache - 1].swap[1] = page[p].bytes[1]
		:: else
		fi;
		page[p].bytes[0] = 0;
		page[p].bytes[1] = 0;
		page[p].swapcache = 0;
		page[p].uptodate = 0;
		page[p].dirty = 0
	:: else
	fi
}

/* A free page, or the one that the swap cache has of a file. */
inline page_find(p, swapcached)
{
	p = 0;
	do
	:: p < PAGES && !(swapcached -> page[p].swapcache == swapcached :
			  page[p].refs == 0 && page[p].owner == 0) -> p++
	:: else -> break
	od
}

inline put_page(p)
{
	page[p].refs = page[p].refs & ~BIT(me);
	page_settle(p)
}

/* The file's page is gone from it. */
inline page_remove(f)
{
	n = PAGE_OF(f);
	file[f].entry = 0;
	page[n].owner = 0;
	page[n].dirty = 0;
	page_settle(n);
	n = 0
}

/* shmem_truncate_range(), which waits for the page lock first */
inline punch(f)
{
	if
	:: file[f].entry == SWAP ->
		page_find(n, 1 + f);
		if
		:: n < PAGES ->
			page[n].swapcache = 0;
			page[n].dirty = 0;
			page_settle(n)
		:: else
		fi;
		file[f].entry = 0
	:: HAS_PAGE(f) -> page_remove(f)
	:: else
	fi;
	file[f].swap[0] = 0;
	file[f].swap[1] = 0;
	n = 0
}

/* A new page of the file, with a reference */
inline page_add(f, p, content)
{
	page_find(p, 0);
	assert(p < PAGES);
	page[p].bytes[0] = content;
	page[p].bytes[1] = content;
	page[p].owner = 1 + f;
	page[p].refs = BIT(me);
	file[f].entry = 1 + p
}

/* nbdcow_write_begin(), where the file has nothing */
inline write_begin(f, p)
{
	page_add(f, p, GARBAGE);
	page[p].locked = 1
}

/*
 * store_find() or, if that finds none, shmem_read_mapping_page_gfp(). That
 * waits for the lock of a page that is not up to date, and makes it so with zeroes.
 */
inline shmem_read(f, p)
{
	!LOCKED(f) || page[PAGE_OF(f)].uptodate;
	if
	:: file[f].entry == 0 ->
		/* not locked any more, not dirty yet */
		page_add(f, p, ZERO_BYTES);
		page[p].uptodate = 1
	:: HAS_PAGE(f) && !page[PAGE_OF(f)].uptodate ->
		p = PAGE_OF(f);
		page[p].bytes[0] = ZERO_BYTES;
		page[p].bytes[1] = ZERO_BYTES;
		page[p].uptodate = 1
	:: file[f].entry == SWAP ->
		page_find(p, 1 + f);
		if
		:: p == PAGES ->
			page_find(p, 0);
			assert(p < PAGES);
			page[p].bytes[0] = file[f].swap[0];
			page[p].bytes[1] = file[f].swap[1];
			page[p].uptodate = 1
		:: else
		fi;
		page[p].swapcache = 0;
		page[p].owner = 1 + f;
		page[p].dirty = 1;
		file[f].entry = 1 + p;
		file[f].swap[0] = 0;
		file[f].swap[1] = 0
	:: else -> p = PAGE_OF(f)
	fi;
	page[p].refs = page[p].refs | BIT(me)
}

#if MUTANT == NO_LAST_LOOK
#define STILL_OF(f, p)	1
#else
#define STILL_OF(f, p)	(page[p].owner == 1 + f)
#endif
#define IS_OF(f, p)	(page[p].owner == 1 + f && page[p].uptodate)

/*
 * kernel/map.c, in d_steps
 */

/* Nobody may get at a leaf that may be gone. */
#define leaf_is_safe(n)	(!leaf[n].going || (leaf[n].readers & BIT(me)))

/* The second half of nbdcow_map_run(), which got the slot a step before. */
inline map_word()
{
	if
	:: slot < LEAF -> state = slot
	:: else ->
		assert(leaf_is_safe(slot - LEAF));
		state = leaf[slot - LEAF].word
	fi;
	slot = 0
}

/* nbdcow_map_run() under a shard lock, where no state but of installs changes */
inline map_run()
{
	assert(!layers[lay].freed);
	slot = layers[lay].slot;
	map_word()
}

inline map_prepare()
{
	if
	:: layers[lay].slot < LEAF ->
		i = 0;
		do
		:: i < LEAVES && leaf[i].used -> i++
		:: else -> break
		od;
		assert(i < LEAVES);
		leaf[i].used = 1;
		leaf[i].word = layers[lay].slot;
		layers[lay].slot = LEAF + i;
		i = 0
	:: else
	fi
}

inline map_change(to)
{
	n = layers[lay].slot - LEAF;
	assert(!layers[lay].freed && n < LEAVES && leaf_is_safe(n));
	stored = (leaf[n].word == OVERLAY);
	leaf[n].word = to;
	n = 0
}

inline map_zero_leaf()
{
	n = layers[lay].slot;
	layers[lay].slot = ZERO;
	if
	:: n >= LEAF ->
		n = n - LEAF;
		assert(leaf_is_safe(n));
		stored = stored || leaf[n].word == OVERLAY;
		/* call_rcu() */
		leaf[n].going = 1;
#if MUTANT != NO_GRACE_LEAF
		leaf[n].readers = rcu
#endif
	:: else
	fi;
	n = 0
}

/*
 * kernel/overlay.c
 */

/*
 * nbdcow_overlay_copy() as far as the copying: `found' is 1 if that may begin, in the
 * page `p' with a reference and, for `write', locked. RCU is unlocked if not.
 */
inline overlay_copy(write)
{
	atomic {
		rcu_read_lock();
		lay = layer
	}
#if MUTANT == LOOK_BEFORE_FIND
	slot = layers[lay].slot;
	d_step { map_word() }
#endif
	d_step {
		/* nbdcow_store_walk() */
		assert(!layers[lay].freed);
#if MUTANT == LAYER_TWICE
		f = layers[layer].file;
#else
		f = layers[lay].file;
#endif
		found = HAS_PAGE(f);
		if
		:: found ->
			p = PAGE_OF(f);
#if MUTANT != NO_UPTODATE_CHECK
			found = page[p].uptodate
#endif
		:: else
		fi;
		if
		:: found -> page[p].refs = page[p].refs | BIT(me)
		:: else -> p = 0
		fi
	}
	if
	:: found && write ->
		d_step {
			/* nbdcow_store_lock() */
			found = !page[p].locked && IS_OF(f, p);
			if
			:: found -> page[p].locked = 1
			:: else -> put_page(p)
			fi
		}
	:: else
	fi;
	if
#if MUTANT == NO_LOOK
	:: found -> state = OVERLAY
#elif MUTANT != LOOK_BEFORE_FIND
	:: found ->
		slot = layers[lay].slot;
		d_step { map_word() }
#endif
	:: else
	fi;
	d_step {
		if
		:: found && !(state == OVERLAY && STILL_OF(f, p)) ->
			if
			:: write -> page[p].locked = 0
			:: else
			fi;
			put_page(p);
			found = 0
		:: else
		fi;
#if MUTANT == NO_READ_REF
		if
		:: found && !write -> put_page(p)
		:: else
		fi;
#endif
		if
		:: !found -> rcu_read_unlock()
		:: else
		fi;
		state = 0;
		lay = 0;
		f = 0
	}
}

/* The page is there, or was never stored. */
#define IN_MEMORY(f)	(file[f].entry == 0 || (HAS_PAGE(f) && page[PAGE_OF(f)].uptodate))

/* nbdcow_store_get_locked(): `found' is 0 for -EINPROGRESS */
inline store_get_locked()
{
	found = 0;
	do
	:: found -> break
	/* in map(): a work will do it */
	:: atomic { !found && !work && !IN_MEMORY(f) -> break }
	:: atomic {
		!found && (work || IN_MEMORY(f)) ->
		shmem_read(f, p)
	   }
#if MUTANT == NO_SLOW_LOCK
		found = 1
#else
		atomic {
			!page[p].locked ->
			if
			:: IS_OF(f, p) -> found = 1; page[p].locked = 1
			:: else -> put_page(p); p = 0
			fi
		}
#endif
	od
}

/* In a d_step: a write of `op' to the page */
inline copy_to_page()
{
	if
	:: kind[op] != HALF1 -> page[p].bytes[0] = WRITTEN + op
	:: else
	fi;
	if
	:: kind[op] != HALF0 -> page[p].bytes[1] = WRITTEN + op
	:: else
	fi
}

inline unlock_and_put()
{
#if MUTANT == NO_SLOW_LOCK
	/* only nbdcow_write_begin() locked it; `found' is 0 then */
	page[p].locked = page[p].locked && found;
#else
	page[p].locked = 0;
#endif
	put_page(p);
	p = 0
}

inline copy_from_page()
{
	got[0] = page[p].bytes[0];
	got[1] = page[p].bytes[1]
}

/* What a client forgets between operations. */
inline forget()
{
	lay = 0;
	slot = 0;
	state = 0;
	f = 0;
	p = 0;
	found = 0;
	stored = 0;
	has_base = 0;
	work = 0;
	gone[0] = 0;
	gone[1] = 0;
	past = 0;
	got[0] = 0;
	got[1] = 0
}

inline layer_free(lay)
{
	assert(!layers[lay].freed);
	layers[lay].freed = 1;
	layers[lay].slot = 0;
	layers[lay].used = 0;
	layers[lay].file = 0
}

byte running;		/* clients that have not ended */

proctype client(byte me; byte op; byte last)
{
	byte lay, slot, state, f, p, gone[2], past, got[2];
	bit found, stored, has_base, work;

next:
	if
	:: op == last -> goto out
	:: op < last && kind[op] == READ -> goto read
	:: op < last && (kind[op] == WHOLE || kind[op] == HALF0 || kind[op] == HALF1) ->
		goto write
	:: op < last && kind[op] == DISCARD -> goto zero
	:: op < last && kind[op] >= RESET -> goto replace
	fi;

read:	/* map_read(), nbdcow_overlay_read() */
	atomic {
		gone[0] = dead[0];
		gone[1] = dead[1];
		past = ended;
		rcu_read_lock();
		lay = layer;
		slot = layers[lay].slot
	}
read_again:
	atomic {
		map_word();
		rcu_read_unlock();
		lay = 0;
		got[0] = (state == ZERO -> ZERO_BYTES : BASE_BYTES);
		got[1] = got[0]
	}
	if
	:: state != OVERLAY -> goto read_done
	:: else
	fi;
	overlay_copy(0);
	if
	:: found ->
		d_step {
			copy_from_page();
			put_page(p);
			rcu_read_unlock()
		}
		goto read_done
	:: else
	fi;
	d_step {
		!shard_writer ->
		shard_readers++;
		lay = layer;
		map_run();
		f = layers[lay].file
	}
	if
	:: state == OVERLAY -> store_get_locked()
	:: else
	fi;
	atomic {
		shard_readers--;
		if
		:: found ->
			copy_from_page();
			unlock_and_put()
		:: else ->
			/* -ESTALE, or from a work with patience */
			work = work || state == OVERLAY;
			rcu_read_lock();
			lay = layer;
			slot = layers[lay].slot
		fi;
		f = 0;
		state = 0
	}
	if
	:: !found -> goto read_again
	:: else
	fi;
read_done:
	atomic {
		check_half(0, gone[0], past, got[0]);
		check_half(1, gone[1], past, got[1]);
		ended = ended | BIT(op);
		forget();
		op++
	}
	goto next;

write:	/* nbdcow_overlay_write(), and what calls it again */
	atomic { op_begin(op) }
write_again:
	if
	:: !work ->
		/* map_write(): the look before is only a hint, so there is none */
#if MUTANT == NO_REWRITE_LOCK
		overlay_copy(0)
#elif MUTANT == NO_LOOK || MUTANT == LOOK_BEFORE_FIND
		d_step {
			lay = layer;
			map_run();
			lay = 0
		}
		if
		:: state == OVERLAY -> state = 0; overlay_copy(1)
		:: else -> state = 0
		fi
#else
		overlay_copy(1)
#endif
	:: true
	fi;
	if
	:: found ->
		d_step {
			copy_to_page();
			page[p].dirty = 1;
#if MUTANT != NO_REWRITE_LOCK
			page[p].locked = 0;
#endif
			put_page(p);
			p = 0;
			rcu_read_unlock()
		}
		goto write_done
	:: else
	fi;
	/* __overlay_write() */
	d_step {
#if MUTANT != NO_SHARD_READ
		!shard_writer ->
		shard_readers++;
#endif
		lay = layer;
		map_run();
		f = layers[lay].file
	}
	if
	:: state == BASE && kind[op] != WHOLE && !has_base ->
		/* -ENODATA: once more with the base */
		d_step {
#if MUTANT != NO_SHARD_READ
			shard_readers--;
#endif
			lay = 0;
			f = 0;
			has_base = 1;
			work = 1
		}
		goto write_again
#if MUTANT == NO_SECOND_LOOK
	:: state == OVERLAY && !has_base -> goto rewrite_slowly
#else
	:: state == OVERLAY -> goto rewrite_slowly
#endif
	:: else
	fi;
	/* install_block() */
	d_step {
#if MUTANT != NO_INSTALLER_LOCK
		!installer ->
		installer = 1;
#endif
		map_run()
	}
	if
	:: state == OVERLAY ->
#if MUTANT != NO_INSTALLER_LOCK
		installer = 0;
#endif
#if MUTANT == NO_SECOND_LOOK
		if
		:: has_base ->
			store_get_locked();
			atomic {
				page[p].bytes[0] = BASE_BYTES;
				page[p].bytes[1] = BASE_BYTES;
				copy_to_page();
				page[p].dirty = 1
			}
			goto filled
		:: else
		fi;
#endif
		goto rewrite_slowly
	:: else
	fi;
	/* get_new() */
	d_step {
		layers[lay].used++;
		total_used++;
		map_prepare()
	}
	/* nbdcow_store_new() */
	if
	:: d_step { file[f].entry == 0 -> write_begin(f, p) }
		goto fill_and_publish
	:: true			/* -ENOMEM, or there is something */
#if FAIL
	:: true -> goto no_page
#endif
	fi;
	store_get_locked();
	if
	:: !found -> goto no_page
#if FAIL
	:: found ->
		/* NBDCOW_NOWAIT did not get the lock: the page stays, zeroed */
		d_step { unlock_and_put(); found = 0 }
		goto no_page
#endif
	:: found
	fi;
fill_and_publish: /* `state' is what it was under the lock */
#if MUTANT == STATE_BEFORE_DATA
	atomic { map_change(OVERLAY) }
#endif
	atomic {
		if
		:: kind[op] == WHOLE
#if MUTANT == NO_FILL
		:: kind[op] != WHOLE && state == ZERO
#endif
#if MUTANT == BASE_OVER_ZERO
		:: kind[op] != WHOLE && has_base ->
			page[p].bytes[0] = BASE_BYTES;
			page[p].bytes[1] = BASE_BYTES
#endif
		:: else ->
			page[p].bytes[0] = (state == BASE -> BASE_BYTES : ZERO_BYTES);
			page[p].bytes[1] = (state == BASE -> BASE_BYTES : ZERO_BYTES)
		fi
	}
	d_step { copy_to_page() }
	d_step {
		/* nbdcow_store_filled() */
#if MUTANT != NO_UPTODATE && MUTANT != UPTODATE_LATE
		page[p].uptodate = 1;
#endif
#if MUTANT != DIRTY_LATE
		page[p].dirty = 1;
#endif
#if MUTANT != STATE_BEFORE_DATA
		map_change(OVERLAY);
#endif
	}
filled:
	atomic {
#if MUTANT == DIRTY_LATE
		n = p;
		unlock_and_put();
		p = n;
		n = 0;
#elif MUTANT == UPTODATE_LATE
		page[p].locked = 0;
#else
		unlock_and_put();
#endif
#if MUTANT != NO_INSTALLER_LOCK
		installer = 0;
#endif
#if MUTANT != NO_SHARD_READ
		shard_readers--
#endif
	}
#if MUTANT == DIRTY_LATE
	page[p].dirty = page[p].refs || page[p].owner || page[p].swapcache;
#elif MUTANT == UPTODATE_LATE
	d_step { page[p].uptodate = 1; put_page(p) }
#endif
	goto write_done;
no_page:
	atomic {
		/* unreserve() */
		layers[lay].used--;
		total_used--;
#if MUTANT != NO_INSTALLER_LOCK
		installer = 0;
#endif
#if MUTANT != NO_SHARD_READ
		shard_readers--;
#endif
	}
	if
	:: !work ->
		d_step { lay = 0; f = 0; state = 0; work = 1 }
		goto write_again
	:: work ->
		d_step { op_fail(op); forget(); op++ }
		goto next
	fi;
rewrite_slowly:
	store_get_locked();
	if
	:: found ->
		d_step {
			copy_to_page();
			page[p].dirty = 1;
			unlock_and_put();
#if MUTANT != NO_SHARD_READ
			shard_readers--
#endif
		}
	:: else ->
		d_step {
#if MUTANT != NO_SHARD_READ
			shard_readers--;
#endif
			lay = 0;
			f = 0;
			state = 0;
			work = 1
		}
		goto write_again
	fi;
write_done:
	atomic { op_end(op); forget(); op++ }
	goto next;

zero:	/* nbdcow_overlay_zero(): of the whole leaf, or of this block and others */
	atomic {
#if MUTANT != NO_SHARD_WRITE
		!shard_writer && shard_readers == 0 ->
		shard_writer = 1;
#endif
		op_begin(op);
		lay = layer;
		map_run();
		f = layers[lay].file
	}
	if
	:: state == ZERO -> goto zero_done
	:: else
	fi;
	if
	:: d_step { map_zero_leaf() }
	:: d_step { map_prepare(); map_change(ZERO) }
		if
		:: d_step { map_zero_leaf() }	/* the others are ZERO already */
		:: true
		fi
	fi;
#if MUTANT == PUNCH_UNLOCKED
	shard_writer = 0;
#endif
	if
	:: stored ->
		d_step {
			!LOCKED(f) ->
			punch(f);
			layers[lay].used--;
			total_used--
		}
	:: else
	fi;
zero_done:
	atomic {
#if MUTANT != NO_SHARD_WRITE && MUTANT != PUNCH_UNLOCKED
		shard_writer = 0;
#elif MUTANT == PUNCH_UNLOCKED
		if
		:: state == ZERO -> shard_writer = 0
		:: else
		fi;
#endif
		op_end(op);
		forget();
		op++
	}
	goto next;

replace: /* nbdcow_overlay_reset(), overlay_grow(); p is the new layer */
	if
	:: kind[op] == RESET && !dying
	:: kind[op] == GROW
	fi;
#if MUTANT != NO_MUTEX
	atomic { !mutex -> mutex = 1 }
#endif
	/* lock_all_shards() */
	if
	:: kind[op] == RESET ->
		lay = layer;
#if MUTANT != NO_SHARD_RESET
		atomic { !shard_writer && shard_readers == 0 -> shard_writer = 1 }
#endif
	:: kind[op] == GROW ->
#if MUTANT != NO_SHARD_GROW
		atomic { !shard_writer && shard_readers == 0 -> shard_writer = 1 }
#endif
	fi;
	d_step {
		lay = (kind[op] == RESET -> lay : layer);
		p = nr_layers;
		nr_layers++;
		if
		:: kind[op] == RESET ->
			op_begin(op);
			layers[p].file = p
		:: else ->
			/* nbdcow_map_take_over() */
			layers[p].file = layers[lay].file;
			layers[p].slot = layers[lay].slot;
			layers[p].used = layers[lay].used
		fi
	}
	if
	:: d_step {
		kind[op] == RESET ->
		layer = p;
		/* unreserve() */
		total_used = total_used - layers[lay].used;
		layers[lay].used = 0;
		dying++;
		layers[lay].queued = 1;
#if MUTANT != NO_GRACE_RESET
		layers[lay].readers = rcu;
#endif
#if MUTANT != NO_SHARD_RESET
		shard_writer = 0;
#endif
#if MUTANT != NO_MUTEX
		mutex = 0;
#endif
		op_end(op)
	   }
	:: d_step {
		kind[op] == GROW ->
		layer = p;
#if MUTANT == GRACE_UNLOCKED
		shard_writer = 0;
#endif
#if MUTANT != NO_GRACE_GROW
		layers[lay].readers = rcu
#endif
	   }
		d_step {
			/* synchronize_rcu() */
			!layers[lay].readers ->
#if MUTANT != NO_SHARD_GROW && MUTANT != GRACE_UNLOCKED
			shard_writer = 0;
#endif
#if MUTANT != NO_MUTEX
			mutex = 0;
#endif
			layer_free(lay)
		}
	fi;
	atomic { forget(); op++ }
	goto next;

out:
	running--
}

/* Nobody could look in between, so one of them is as good as one for each layer. */
inline layer_work_of(lay)
{
	d_step {
		layers[lay].queued && !layers[lay].readers && !LOCKED(layers[lay].file) ->
		layers[lay].queued = 0;
		/* layer_destroy() */
		f = layers[lay].file;
		punch(f);
		f = 0;
		if
		:: layers[lay].slot >= LEAF -> leaf[layers[lay].slot - LEAF].going = 1
		:: else
		fi;
		total_used = total_used - layers[lay].used;
		layer_free(lay);
		assert(!ov_gone);
		dying--
	}
}

#if LAYERS > 1
active proctype layer_work()
{
	byte f;

end:
	do
	:: layer_work_of(0)
#if LAYERS > 2
	:: layer_work_of(1)
#endif
	od
}
#endif

/*
 * Reclaim: shmem_writeout() of a dirty page and __remove_mapping() of a clean one.
 * And migration, which copies before it replaces the page (6.12) or after (6.1):
 * whoever has a reference when it freezes them stops it. As nobody has one then, the
 * old and the new page are one here.
 */
#define CAN_MOVE(f)	(HAS_PAGE(f) && !page[PAGE_OF(f)].locked)

inline memory_of(f)
{
	if
	:: d_step {
		CAN_MOVE(f) && page[PAGE_OF(f)].dirty ->
		n = PAGE_OF(f);
		file[f].swap[0] = page[n].bytes[0];
		file[f].swap[1] = page[n].bytes[1];
		file[f].entry = SWAP;
		page[n].owner = 0;
		page[n].swapcache = 1 + f;
		page[n].dirty = 0;
		page_settle(n);
		n = 0
	   }
	:: d_step {
		CAN_MOVE(f) && page[PAGE_OF(f)].refs == 0 && !page[PAGE_OF(f)].dirty ->
		page_remove(f)
	   }
	:: d_step {
		CAN_MOVE(f) && page[PAGE_OF(f)].refs == 0 ->
		moving = PAGE_OF(f);
		page[moving].locked = 1;
		copy[0] = page[moving].bytes[0];
		copy[1] = page[moving].bytes[1]
	   }
		if
		:: d_step {
			page[moving].refs == 0 ->
			page[moving].bytes[0] = GARBAGE;
			page[moving].bytes[1] = GARBAGE;
			page[moving].uptodate = 0
		   }
		:: true
		fi;
		d_step {
			if
			:: page[moving].refs == 0 || !page[moving].uptodate ->
				page[moving].bytes[0] = copy[0];
				page[moving].bytes[1] = copy[1];
				page[moving].uptodate = 1
			:: else
			fi;
			page[moving].locked = 0;
			moving = 0;
			copy[0] = 0;
			copy[1] = 0
		}
	fi
}

#if MEMORY
active proctype memory()
{
	byte moving, copy[2];

end:
	do
	:: memory_of(0)
#if LAYERS > 1
	:: memory_of(1)
#endif
#if LAYERS > 2
	:: memory_of(2)
#endif
	od
}
#endif

/*
 * Another block of the same page is stored, which brings the page, with zeroes for ours,
 * and then discarded, with which the page goes unless ours is stored by then.
 */
#define WORD(lay) \
	(layers[lay].slot < LEAF -> layers[lay].slot : leaf[layers[lay].slot - LEAF].word)

inline neighbour_of(f)
{
	d_step {
		nr_layers > f && layers[f].file == f && !layers[f].freed && !layers[f].queued &&
		file[f].entry == 0 ->
		page_find(n, 0);
		page[n].bytes[0] = ZERO_BYTES;
		page[n].bytes[1] = ZERO_BYTES;
		page[n].owner = 1 + f;
		page[n].uptodate = 1;
		page[n].dirty = 1;
		file[f].entry = 1 + n;
		n = 0
	}
	if
	:: d_step { HAS_PAGE(f) && !LOCKED(f) && WORD(f) != OVERLAY -> page_remove(f) }
	:: !HAS_PAGE(f) || WORD(f) == OVERLAY
	fi
}

#if NEIGHBOUR
active proctype neighbour()
{
end:
	running ->
	if
	:: neighbour_of(0)
#if LAYERS > 1
	:: neighbour_of(1)
#endif
	:: true
	fi;
	running--
}
#endif

#define ALLOWED(op) \
	((KINDS & BIT(kind[op])) && (WANTED(op) == ANY || WANTED(op) == kind[op]))

/* The block as it is at first. */
inline choose_start()
{
	nr_layers = 1;
	begun = 1;
	ended = 1;
	if
	:: kind[0] = RESET
	:: kind[0] = RESET;		/* there is a leaf, of other blocks */
		leaf[0].used = 1;
		layers[0].slot = LEAF
	:: kind[0] = DISCARD;
		layers[0].slot = ZERO
	:: kind[0] = DISCARD;
		leaf[0].used = 1;
		leaf[0].word = ZERO;
		layers[0].slot = LEAF
	:: kind[0] = WHOLE;
		leaf[0].used = 1;
		leaf[0].word = OVERLAY;
		layers[0].slot = LEAF;
		layers[0].used = 1;
		total_used = 1;
		page[0].bytes[0] = WRITTEN;
		page[0].bytes[1] = WRITTEN;
		page[0].owner = 1;
		page[0].uptodate = 1;
		page[0].dirty = 1;
		file[0].entry = 1
	fi
}

/* All is quiet: the last read, and nothing is left over. */
inline check_outcome()
{
	assert(!shard_readers && !shard_writer && !installer && !mutex && !rcu);
	lay = layer;
	map_run();
	f = layers[lay].file;
	assert(layers[lay].used == (state == OVERLAY));
	assert(total_used == layers[lay].used);
	got[0] = (state == ZERO -> ZERO_BYTES : BASE_BYTES);
	got[1] = got[0];
	if
	:: state == OVERLAY && file[f].entry == SWAP ->
		got[0] = file[f].swap[0];
		got[1] = file[f].swap[1]
	:: state == OVERLAY && file[f].entry != SWAP ->
		assert(HAS_PAGE(f));
		got[0] = page[PAGE_OF(f)].bytes[0];
		got[1] = page[PAGE_OF(f)].bytes[1]
	:: else
#if !FAIL
		-> assert(file[f].entry == 0)
#endif
	fi;
	check_half(0, dead[0], 0, got[0]);
	check_half(1, dead[1], 0, got[1]);
	i = 0;
	do
	:: i < nr_layers ->
		assert(i == lay || layers[i].freed);
		assert(i == f || file[i].entry == 0);
		i++
	:: else -> break
	od;
	i = 0;
	do
	:: i < LEAVES ->
		assert(!leaf[i].used || leaf[i].going || layers[lay].slot == LEAF + i);
		i++
	:: else -> break
	od;
	i = 0
}

init
{
	byte op = 1, layers_left = LAYERS - 1, lay, slot, state, f, got[2];
	byte me = 7;		/* nobody */

	atomic {
		choose_start();
		do
		:: op < OPS ->
			/* clients with one operation are alike: in one order only */
			kind[op] = (OPS0 == 1 && OPS1 == 1 && op > 1 && op < 4 ->
				    kind[op - 1] : READ);
			do
			:: kind[op] < GROW -> kind[op]++
			:: break
			od;
			if
			:: !ALLOWED(op) -> goto end_other
			:: ALLOWED(op) && kind[op] >= RESET ->
				if
				:: layers_left -> layers_left--
				:: else -> goto end_other
				fi
			:: else
			fi;
			op++
		:: else -> break
		od;
		op = 0;
		layers_left = 0;
		running = (OPS0 != 0) + (OPS1 != 0) + (OPS2 != 0) + NEIGHBOUR;
		run client(0, 1, 1 + OPS0);
#if OPS1
		run client(1, 1 + OPS0, 1 + OPS0 + OPS1);
#endif
#if OPS2
		run client(2, 1 + OPS0 + OPS1, OPS);
#endif
	}
	/* nbdcow_overlay_put() */
	d_step {
#if MUTANT == NO_DYING
		running == 0 ->
#else
		running == 0 && !dying ->
#endif
		ov_gone = 1
	}
	d_step {
		!dying && !LOCKED(layers[layer].file) ->
		check_outcome()
	}
end_other:
	skip
}
