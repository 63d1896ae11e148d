// Package pricing turns what a lineage takes in storage into what it costs a month. It holds no truth about prices: a
// [Table] is an assumption with a name and a date, to be replaced by the prices of one's own contract and region.
package pricing

import (
	"errors"
	"fmt"
	"math"
)

const (
	gib = 1 << 30
	// daysPerMonth is how a day is carried forward to a month.
	daysPerMonth = 30
	// requestsPerPrice is the number of requests that a price of requests is for.
	requestsPerPrice = 10_000
)

// Media is what bytes are kept in.
type Media int

// The media.
const (
	// Blocks are block blobs: journal, staging, orphans.
	Blocks Media = iota
	// Pages are page blobs and the pages that only their snapshots hold.
	Pages
)

// Table is a list of prices, all in Currency.
type Table struct {
	// Name says whose prices they are and under which assumption.
	Name string `koanf:"name" help:"whose prices these are"`
	// Date on which they were read, as people write it.
	Date string `koanf:"date" help:"when they were read"`
	// Currency of all prices.
	Currency string `koanf:"currency" help:"currency of all prices, for example USD"`
	// BlockGiBMonth is the price of one GiB of block blobs for a month.
	BlockGiBMonth float64 `koanf:"block_gib_month" help:"one GiB of block blobs for a month"`
	// PageGiBMonth is the price of one GiB of written pages for a month, of disks and of snapshots.
	PageGiBMonth float64 `koanf:"page_gib_month" help:"one GiB of written pages for a month, snapshots too"`
	// Writes10k is the price of 10,000 requests that write, of blocks and of pages.
	Writes10k float64 `koanf:"writes_10k" help:"10,000 requests that write"`
	// PageWriteBytes is how many stored bytes one request to a page blob is assumed to carry when the journal is applied.
	PageWriteBytes int64 `koanf:"page_write_bytes" help:"stored bytes that one page write is assumed to carry"`
}

// Default is Azure's list for standard storage, hot and locally redundant, United States, in US dollars, as the project assumed
// it in November 2026. It was not read from a bill.
func Default() Table {
	return Table{
		Name: "Azure list, US, LRS, hot (assumed; set scheduler.prices)", Date: "2026-11", Currency: "USD",
		BlockGiBMonth: 0.0184, PageGiBMonth: 0.045, Writes10k: 0.05, PageWriteBytes: 128 << 10,
	}
}

// Validate reports every problem, with the key.
func (t Table) Validate() error {
	var errs []error
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	price := func(key string, v float64) {
		bad(v >= 0 && !math.IsNaN(v) && !math.IsInf(v, 0), "%s: %v is not a price", key, v)
	}
	bad(t.Name != "", "name: must say whose prices these are")
	bad(t.Currency != "", "currency: must be set")
	price("block_gib_month", t.BlockGiBMonth)
	price("page_gib_month", t.PageGiBMonth)
	price("writes_10k", t.Writes10k)
	bad(t.PageWriteBytes >= 512, "page_write_bytes: %d is below 512", t.PageWriteBytes)
	return errors.Join(errs...)
}

// String is the name and the date.
func (t Table) String() string {
	if t.Date == "" {
		return t.Name
	}
	return t.Name + ", " + t.Date
}

// Storage is what bytes of a medium cost a month. Negative bytes cost nothing.
func (t Table) Storage(m Media, bytes int64) float64 {
	price := t.BlockGiBMonth
	if m == Pages {
		price = t.PageGiBMonth
	}
	return float64(max(bytes, 0)) / gib * price
}

// Requests are the requests of a month, carried forward from what one day put into the journal: thirty times one request for
// each object, and one page write for every PageWriteBytes of them, once they are applied. Reads and listings are not
// counted: they cost a tenth and less.
func (t Table) Requests(dayPuts, dayBytes int64) int64 {
	dayPuts, dayBytes = max(dayPuts, 0), max(dayBytes, 0)
	pages := dayBytes / t.PageWriteBytes
	if dayBytes%t.PageWriteBytes != 0 {
		pages++
	}
	return daysPerMonth * (dayPuts + pages)
}

// RequestCost is what requests that write cost.
func (t Table) RequestCost(requests int64) float64 {
	return float64(max(requests, 0)) / requestsPerPrice * t.Writes10k
}
